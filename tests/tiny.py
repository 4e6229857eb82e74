"""A tiny chat model with a tokenizer of its own, and rows that it can learn in a few steps."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_core.artifacts import DataFile, DataSnapshot, MergeProof, ModelSnapshot, PreparedDataset
from qlora_core.events import ignore
from qlora_core.recipe import DataRecipe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
THINGS = ["door", "boat", "lamp", "coat", "chair", "kite", "cup", "wall", "hat", "car", "bell", "box"]
CONTEXT_TOKENS = 256
PLAIN_TEXT = "The river runs past the old mill and under the bridge. " * 40


def write_model(folder: Path, hidden: int = 64, family: str = "llama") -> Path:
    """A model of about 100,000 random parameters as a plain model folder."""
    torch.manual_seed(5)
    tokenizer = _tokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=CONTEXT_TOKENS,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 72) -> Path:
    """Alpaca rows with a simple rule: a thing is painted in the colour that was asked for."""
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS][:count]
    rows = [
        {"instruction": f"Paint the {thing} {colour}.", "output": f"The {thing} is {colour}."}
        for colour, thing in pairs
    ]
    path.write_text(json.dumps(rows))
    return path


def prepare_rows(base: ModelSnapshot, folder: Path) -> PreparedDataset:
    """The rows, tokenized for a model."""
    from qlora_core.data.prepare import prepare

    for part in ("raw", "prepared"):
        (folder / part).mkdir(parents=True)
    path = write_rows(folder / "raw" / "rows.json")
    rows = (DataFile(name="rows.json", source="tiny", bytes=path.stat().st_size),)
    recipe = DataRecipe.model_validate({"rows": [{"source": "local", "path": str(path)}], "seq_len_tokens": 128})
    snapshot = DataSnapshot(path=folder / "raw", rows=rows)
    made = prepare(recipe, 17, base, snapshot, folder / "prepared", ignore)
    return made.model_copy(update={"digest": "d" * 64})


def write_recipe(folder: Path, **replaced: object) -> Path:
    """A recipe with its model, rows and text beside it; ready to run on two cores in well under a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_rows(folder / "rows.json")
    (folder / "text.txt").write_text(PLAIN_TEXT)
    recipe = {
        "name": "tiny-painter",
        "model": {"source": "local", "path": "model"},
        "data": {
            "rows": [{"source": "local", "path": "rows.json"}],
            "seq_len_tokens": 128,
            "split": {"evaluation_fraction": 0.2},
            "forgetting": [{"source": "local", "path": "text.txt"}],
            "forgetting_tokens": 256,
        },
        "train": {
            "lora": {"rank": 8, "alpha": 16},
            "epochs": 10,
            "max_steps": 12,
            "effective_batch_rows": 8,
            "learning_rate": 0.02,
            "checkpoint_every_steps": 2,
            "processes": 1,
        },
        "evaluation": {"metrics": ["loss", "forgetting", "exact_match"], "generation": {"max_new_tokens": 12}},
        "promotion": {"gates": [{"metric": "loss", "against": "base"}, {"metric": "loss", "against": "champion"}]},
        **replaced,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [f"Paint the {thing} {colour}. The {thing} is {colour}." for thing in THINGS for colour in COLOURS]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    bpe.train_from_iterator([*words, PLAIN_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=256,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def merge_proof(**fields: Any) -> MergeProof:
    """Of a merge that changed nothing, for tests that need one and do not look at it."""
    nothing = {
        "tensors": 1,
        "changed": (),
        "unchanged": 1,
        "prediction_difference": 0.0,
        "prediction_limit": 1e-6,
        "largest_logit_difference": 0.0,
        "kl_divergence": 0.0,
        "top1_agreement": 1.0,
        "probe_tokens": 1,
    }
    return MergeProof.model_validate(nothing | fields)
