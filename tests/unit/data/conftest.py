from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_core.artifacts import Architecture, DataFile, DataSnapshot, ModelSnapshot

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SAMPLE = [
    "The quick brown fox asks: what is 12 + 30? It is 42, says the assistant.\n\nThen they rest.",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}',
    "system user assistant <<SYS>> [INST] [/INST] 你好 世界。谢谢你的帮助 🙂",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A ChatML tokenizer whose pad token ends a turn as well, as in many chat models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer built as Llama-2's: spaces become a visible character and words may merge with what follows."""
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def inst() -> PreTrainedTokenizerFast:
    return metaspace_tokenizer()


@pytest.fixture(scope="session")
def base(chatml: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> ModelSnapshot:
    """A model folder that holds nothing but the ChatML tokenizer: all that preparing needs."""
    path = tmp_path_factory.mktemp("base")
    chatml.save_pretrained(path)
    facts: dict[str, Any] = dict.fromkeys(
        ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab", "parameters"), 1
    )
    architecture = Architecture(model_type="llama", context_tokens=2**20, tied_embeddings=True, **facts)
    return ModelSnapshot(path=path, source="test", revision="1", architecture=architecture)


def snapshot(folder: Path, *names: str, forgetting: tuple[str, ...] = ()) -> DataSnapshot:
    def files(found: tuple[str, ...]) -> tuple[DataFile, ...]:
        return tuple(DataFile(name=name, source="test", bytes=(folder / name).stat().st_size) for name in found)

    return DataSnapshot(path=folder, rows=files(names), forgetting=files(forgetting))
