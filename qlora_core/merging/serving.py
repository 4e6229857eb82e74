"""Everything that serving needs beside the weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from qlora_core.errors import MergeError
from qlora_core.modeling.tokenizer import end_of_turn_id, load_tokenizer

CONFIG = "config.json"
GENERATION = "generation_config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
NOT_COPIED_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx", ".ot"}
)
NOT_COPIED_NAMES = frozenset(
    {CONFIG, GENERATION, "manifest.json", "README.md", "quantize_config.json", "quantization_config.json"}
)


TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
)


def write_serving_files(base: Path, trained: Path, model: Path, dtype: str | None) -> None:
    """Copy the base's licence and code files and the tokenizer and template, and write the configurations.

    Args:
        base: the base's folder.
        trained: the folder of the model that was trained on, whose tokenizer and template wrote the training rows.
        model: the merged model's folder.
        dtype: what the weights were cast to; None when they keep the base's.
    """
    for file in sorted(base.rglob("*")):
        name = file.relative_to(base)
        if file.is_file() and not _is_weights_or_ours(name):
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, model / name)
    if trained != base:
        _replace_tokenizer(trained, model)
    config = json.loads((base / CONFIG).read_text())
    _write(model / CONFIG, _with_dtype(config, dtype))
    _write(model / GENERATION, _generation(base, model, config))


def check_config(base: Path, model: Path) -> None:
    """Hold the merged model's configuration against the base's; only the dtype may differ.

    Raises:
        MergeError: another key does.
    """
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (base, model))
    missing = object()
    wrong = sorted(
        key
        for key in before.keys() | after.keys()
        if key not in DTYPE_KEYS and before.get(key, missing) != after.get(key, missing)
    )
    if wrong:
        raise MergeError(
            f"proof of the merge: {CONFIG} of the merged model differs from the base's in {', '.join(wrong)}; nothing "
            "was registered. This is a defect of the merge, please report it with the base's name"
        )


def _replace_tokenizer(trained: Path, model: Path) -> None:
    for pattern in TOKENIZER:
        for file in model.glob(pattern):
            file.unlink()
        for file in trained.glob(pattern):
            shutil.copyfile(file, model / file.name)


def _is_weights_or_ours(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    weights = name.suffix in NOT_COPIED_SUFFIXES or name.name.endswith(".index.json")
    return hidden or weights or name.name in NOT_COPIED_NAMES


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return config
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def _generation(base: Path, model: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The base's generation settings, which stop at the end of a turn as well."""
    tokenizer = load_tokenizer(model)
    file = base / GENERATION
    settings = json.loads(file.read_text()) if file.is_file() else {"bos_token_id": config.get("bos_token_id")}
    known = settings.get("eos_token_id", config.get("eos_token_id"))
    stops = [known] if isinstance(known, int) else list(known or ())
    stops += [token for token in (end_of_turn_id(tokenizer), tokenizer.eos_token_id) if token is not None]
    stops = list(dict.fromkeys(stops))
    settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    settings.setdefault("pad_token_id", tokenizer.pad_token_id)
    return {name: value for name, value in settings.items() if value is not None}


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
