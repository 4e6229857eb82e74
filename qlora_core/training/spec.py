"""What a training process is told; apart from the worker, so that its parent need not load torch."""

from pathlib import Path

from qlora_core.artifacts import ModelSnapshot, PreparedDataset, Record
from qlora_core.recipe import TrainRecipe


class TrainSpec(Record):
    """One training run: how, on what, and where."""

    recipe: TrainRecipe
    seed: int
    base: ModelSnapshot
    dataset: PreparedDataset
    into: Path
