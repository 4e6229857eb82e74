"""What the merging child process is asked to do, and the names of the places it fills."""

from pathlib import Path

from qlora_core.artifacts import Adapter, ModelSnapshot, PreparedDataset, Record
from qlora_core.recipe import MergeRecipe, Quantization

VERSION = 3
"""Raised when merging makes something else from the same input."""

MODEL = "model"
"""Folder of the merged model: what plain transformers loads."""

PROOF = "proof"
"""Folder of what was checked: changes.json and changes.png."""

KEEP = (f"{MODEL}/**/*", f"{PROOF}/**/*")
"""Glob patterns of what belongs to the artifact."""


class MergeSpec(Record):
    """Everything the child needs; `into` is the stage's work directory."""

    recipe: MergeRecipe
    base: ModelSnapshot
    """In full precision: what is merged into."""
    trained: ModelSnapshot
    """What the adapter was trained on: `base`, or the quantized model that it is the twin of."""
    adapter: Adapter
    dataset: PreparedDataset
    into: Path
    trained_on: Quantization | None = None
    """How a full-precision base was held while the adapter was trained; None does not measure that loss."""
