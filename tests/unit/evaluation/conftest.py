"""A tiny random model with a real tokenizer and template, and rows prepared for it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_core.artifacts import PreparedDataset
from qlora_core.modeling.rows import PromptRow, TokenRow, prompt_writer, write_token_rows
from qlora_core.modeling.tokenizer import load_tokenizer, template_digest, tokenizer_digest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [
    "Roll a die.",
    "What is the weather in Oslo today?",
    "Add 2 and 3.",
    "Set a timer for ten minutes, please.",
    "Hi",
]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 60,000 random parameters, saved as a model folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Five questions whose expected answers are tool calls, two windows of other text."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = load_tokenizer(model_path)
    prompts, rows = [], []
    for number, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = json.dumps({"name": f"tool_{number}", "arguments": {"number": number}})
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(expected + "<|im_end|>")["input_ids"]
        prompts.append(PromptRow(f"row-{number}", prompt_ids, prompt, expected, json.dumps(messages)))
        rows.append(_row(f"row-{number}", prompt_ids + answer_ids, len(prompt_ids)))
    other = tokenizer("Rain fell on the hills all night, and by morning the river had left its bed.")["input_ids"]
    with prompt_writer(folder / "prompts.arrow") as write:
        write(prompts)
    write_token_rows(folder / "evaluation.arrow", rows)
    write_token_rows(folder / "train.arrow", rows)
    write_token_rows(folder / "forgetting.arrow", [_row("other-0", other, 0), _row("other-1", other[::-1], 0)])
    return PreparedDataset(
        path=folder,
        digest="d" * 64,
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template_digest(tokenizer),
        train_rows=len(rows),
        evaluation_rows=len(rows),
        dropped={"too_long": 2},
        train_tokens=sum(len(row.input_ids) for row in rows),
        trained_tokens=100,
        evaluation_trained_tokens=100,
        longest_row_tokens=max(len(row.input_ids) for row in rows),
        forgetting_tokens=2 * len(other),
        packing_efficiency=0.9,
    )


def _row(row_id: str, ids: list[int], prompt_tokens: int) -> TokenRow:
    mask = np.arange(len(ids)) >= prompt_tokens
    return TokenRow(row_id, np.array(ids, np.int32), mask.astype(np.uint8))


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        QUESTIONS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials[1:],
    )
    tokenizer.chat_template = CHATML
    return tokenizer
