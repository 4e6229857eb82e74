"""Tiny random models of real families with a real tokenizer, adapters made by PEFT, and prepared rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.artifacts import Adapter, ModelSnapshot, PreparedDataset
from qlora_core.merging.spec import MergeSpec
from qlora_core.modeling.load import read_architecture
from qlora_core.modeling.rows import PromptRow, TokenRow, prompt_writer, write_token_rows
from qlora_core.modeling.tokenizer import load_tokenizer, template_digest, tokenizer_digest
from qlora_core.recipe import MergeRecipe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 320
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "smollm": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["A question. An answer."],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIALS[1:],
    )
    fast.chat_template = CHATML
    return fast


def make_model(family: str, dtype: torch.dtype = torch.float32, hidden: int = 32) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        **FAMILIES[family],
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def save_base(model: PreTrainedModel, folder: Path, max_shard_size: str = "1GB") -> ModelSnapshot:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Licence of the base.\n")
    return ModelSnapshot(
        path=folder,
        digest="b" * 64,
        source="test",
        revision="1",
        architecture=read_architecture(folder),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def save_adapter(model: PreTrainedModel, folder: Path, lora: LoraConfig) -> Adapter:
    """A trained-looking adapter: PEFT starts with B = 0, so every trainable tensor is moved a little."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, lora)
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))  # in place: tied tensors share their storage
    peft_model.save_pretrained(folder)
    peft_model.unload()
    return Adapter(
        path=folder,
        digest="a" * 64,
        base_digest="b" * 64,
        data_digest="d" * 64,
        steps=10,
        rank=lora.r,
        trainable_parameters=1,
        train_loss=1.0,
        evaluation_loss=1.5,
    )


def save_rows(folder: Path, tokenizer_folder: Path) -> PreparedDataset:
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = [
        TokenRow(f"row-{n}", generator.integers(3, 250, 24).astype(np.int32), np.ones(24, np.uint8)) for n in range(6)
    ]
    write_token_rows(folder / "evaluation.arrow", rows)
    write_token_rows(folder / "train.arrow", rows)
    tokenizer = load_tokenizer(tokenizer_folder)
    prompt = "<|im_start|>user\nA question.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt)["input_ids"]
    with prompt_writer(folder / "prompts.arrow") as write:
        write([PromptRow(f"row-{n}", ids, prompt, "An answer.") for n in range(3)])
    return PreparedDataset(
        path=folder,
        digest="d" * 64,
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template_digest(tokenizer),
        train_rows=10,
        evaluation_rows=6,
        dropped={"too_long": 1},
        train_tokens=240,
        trained_tokens=200,
        evaluation_trained_tokens=138,
        longest_row_tokens=24,
        forgetting_tokens=0,
        packing_efficiency=1.0,
    )


@pytest.fixture(name="save_adapter")
def save_adapter_fixture() -> Callable[..., Adapter]:
    return save_adapter


@pytest.fixture
def make_case(tmp_path: Path) -> Callable[..., MergeSpec]:
    """A whole merge to be done, below the test's folder; keywords go to PEFT's LoraConfig."""

    def make(
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        shards: str = "1GB",
        hidden: int = 32,
        merge: dict[str, Any] | None = None,
        **lora: Any,
    ) -> MergeSpec:
        model = make_model(family, dtype, hidden)
        base = save_base(model, tmp_path / "base", shards)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        return MergeSpec(
            recipe=MergeRecipe(**(merge or {})),
            base=base,
            trained=base,
            adapter=save_adapter(model, tmp_path / "adapter", LoraConfig(**settings)),
            dataset=save_rows(tmp_path / "data", base.path),
            into=tmp_path / "into",
        )

    return make
