"""The child's half of fetching a model: convert it if need be, then look at it as transformers will."""

import json
from pathlib import Path
from typing import Any

from qlora_core.artifacts import ModelSnapshot, Record
from qlora_core.events import Report


class SnapshotSpec(Record):
    """What the child is told."""

    into: Path
    """The model's folder; it holds the model already unless `gguf` is given."""
    gguf: Path | None
    source: str
    revision: str


class TwinSpec(Record):
    """What the child that compares two models is told."""

    quantized: ModelSnapshot
    twin: ModelSnapshot


def build(spec: dict[str, Any], report: Report) -> ModelSnapshot:
    """Make the folder a plain transformers folder and return its facts.

    Raises:
        SourceError: it holds no model or tokenizer that transformers can load.
    """
    from qlora_core.modeling.load import read_architecture
    from qlora_core.modeling.tokenizer import load_tokenizer

    asked = SnapshotSpec.model_validate(spec)
    if asked.gguf is not None:
        from qlora_core.hub.gguf_model import convert

        convert(asked.gguf, asked.into, report)
    load_tokenizer(asked.into)
    config = json.loads((asked.into / "config.json").read_text())
    return ModelSnapshot(
        path=asked.into,
        source=asked.source,
        revision=asked.revision,
        architecture=read_architecture(asked.into),
        quantization=quantization_of(config) or _auto_gptq(asked.into),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
    )


def _auto_gptq(folder: Path) -> str | None:
    """Checkpoints that auto-gptq wrote may say how they are quantized in a file of their own."""
    file = folder / "quantize_config.json"
    return f"gptq-int{json.loads(file.read_text())['bits']}" if file.is_file() else None


def quantization_of(config: dict[str, Any]) -> str | None:
    """How the weights of a `config.json` are stored: `gptq-int4`, `bnb-nf4`, ..., or None for full precision."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method", "unknown")
    if method == "bitsandbytes":
        return (
            f"bnb-{quantization.get('bnb_4bit_quant_type', 'fp4')}" if quantization.get("load_in_4bit") else "bnb-int8"
        )
    return f"{method}-int{quantization['bits']}" if "bits" in quantization else str(method)
