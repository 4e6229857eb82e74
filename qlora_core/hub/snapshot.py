"""The child's half of fetching a model: convert it if need be, then look at it as transformers will."""

import json
from pathlib import Path
from typing import Any

from qlora_core.artifacts import ModelSnapshot, Record
from qlora_core.errors import SourceError, refusing
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
    from qlora_core.modeling.bases import adopt_auto_gptq, quantization_of
    from qlora_core.modeling.load import read_architecture
    from qlora_core.modeling.remote_code import code_files, refuse_code_elsewhere
    from qlora_core.modeling.tokenizer import load_tokenizer

    asked = SnapshotSpec.model_validate(spec)
    with refusing(SourceError, f"the model of {asked.source}"):
        if asked.gguf is not None:
            from qlora_core.hub.gguf_model import convert

            convert(asked.gguf, asked.into, report)
        refuse_code_elsewhere(asked.into)
        adopt_auto_gptq(asked.into)
        load_tokenizer(asked.into)
        config = json.loads((asked.into / "config.json").read_text())
        return ModelSnapshot(
            path=asked.into,
            source=asked.source,
            revision=asked.revision,
            architecture=read_architecture(asked.into),
            quantization=quantization_of(config),
            code=code_files(asked.into),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        )
