"""The front door of training: start the training processes and hand on what they report."""

from pathlib import Path

from qlora_core.artifacts import Adapter, ModelSnapshot, PreparedDataset
from qlora_core.errors import TrainingError
from qlora_core.events import Report
from qlora_core.modeling.bases import require_kernels
from qlora_core.process import Group, run_child
from qlora_core.recipe import TrainRecipe
from qlora_core.training.spec import TrainSpec

VERSION = 3
KEEP = ("adapter_config.json", "adapter_model.safetensors", "history.jsonl", "training.png")
"""What of the work directory belongs to the artifact; checkpoints and logs do not."""


def train(
    recipe: TrainRecipe, seed: int, base: ModelSnapshot, dataset: PreparedDataset, into: Path, report: Report
) -> Adapter:
    """Train one QLoRA adapter in child processes; a run that was interrupted goes on from its newest checkpoint.

    Args:
        recipe: how to train.
        seed: of row order, adapter initialization and dropout.
        base: the model to adapt; quantized while loading unless it is already.
        dataset: tokens and loss masks.
        into: work directory; checkpoints live there until the artifact is committed.
        report: hears metrics of every optimizer step and progress.

    Raises:
        SourceError: adapters cannot be trained on a base of this kind.
        TrainingError: nothing can be trained, or training diverged.
        ChildError: a process died; the next call resumes.
    """
    require_kernels(base.quantization, base.source)
    if recipe.strategy == "zero3" and str(base.quantization).startswith("gptq"):
        raise TrainingError(
            f"train.strategy is zero3, and GPTQ weights ({base.source}) are held whole by every process; use zero2, "
            "which divides what is trained, or ddp"
        )
    if dataset.train_rows == 0:
        raise TrainingError("the data set has no training rows; lower data.split.evaluation_fraction or add rows")
    spec = TrainSpec(recipe=recipe, seed=seed, base=base, dataset=dataset, into=into)
    group = Group(processes=_processes(recipe.processes), nodes=recipe.nodes, rendezvous=recipe.strategy != "ddp")
    made = run_child("qlora_core.training.worker:run", spec, into / "child", report, group)
    return Adapter.model_validate(made)


def _processes(wanted: int | str) -> int:
    if wanted != "auto":
        return int(wanted)
    import torch

    return max(1, torch.cuda.device_count())
