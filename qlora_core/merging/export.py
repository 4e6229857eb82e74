"""Export: a merged model in 4 bits, as a folder of its own, measured against the model it was made from."""

from pathlib import Path
from typing import Literal

from qlora_core.artifacts import ExportedModel, PreparedDataset, Record
from qlora_core.events import Report
from qlora_core.merging.spec import MODEL
from qlora_core.process import run_child

Kind = Literal["nf4", "gptq-int4"]
VERSION = 1
"""Raised when exporting makes something else from the same input."""

KEEP = (f"{MODEL}/**/*",)
"""Glob patterns of what belongs to the artifact."""

ENTRY = "qlora_core.merging.export_worker:work"


class ExportSpec(Record):
    """What the child is asked to do; `into` is its work directory."""

    kind: Kind
    model: Path
    """Folder of the merged model."""
    model_digest: str
    dataset: PreparedDataset
    into: Path


def export(
    kind: Kind, model: Path, model_digest: str, dataset: PreparedDataset, into: Path, report: Report
) -> ExportedModel:
    """Write `into/model`, the merged model in 4 bits, and measure what the quantization costs on held-out rows.

    `nf4` is what bitsandbytes loads; `gptq-int4` (arXiv:2210.17323) is calibrated on training rows by GPTQModel,
    which is the extra `gptq` of this package.

    Raises:
        MergeError: the quantizer is not installed or cannot take this model, or the export does not load.
        ChildError: the child was killed.
    """
    spec = ExportSpec(kind=kind, model=model, model_digest=model_digest, dataset=dataset, into=into)
    record = run_child(ENTRY, spec, into / "child", report)
    return ExportedModel.model_validate({**record, "path": into})


__all__ = ["KEEP", "MODEL", "VERSION", "ExportSpec", "Kind", "export"]
