"""What goes into an evaluation and into its report."""

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from qlora_core.artifacts import PreparedDataset, Record, RoundingCost
from qlora_core.recipe import EvaluationRecipe

RowScores = dict[str, float]
AnswerScorer = Callable[[str, str], RowScores]
"""`(expected, answer)` to one value per score."""


class EvaluationSpec(Record):
    """One model on the evaluation rows of one data set; what the parent hands to its child process."""

    recipe: EvaluationRecipe
    seed: int
    model_path: Path
    model_digest: str
    dataset: PreparedDataset
    into: Path


class ReportContext(Record):
    """What the report says beside scores: where the candidate comes from and how its training went."""

    title: str
    recipe_name: str
    created: str
    """ISO 8601, given by the caller so that the same inputs make the same page."""
    curve: Path | None = None
    """JSON lines of training: `step`, `loss`, `learning_rate` and what else was logged."""
    lineage: tuple[tuple[str, str], ...] = ()
    """Role and identity: `("base model", "SmolLM2-135M, sha256 b179c952…")`."""
    needs_approval: bool = False
    """Whether a person decides after the gates have passed."""
    rounding: tuple[RoundingCost, ...] = ()
    """What rounding the merged weights costs, by the dtypes that were tried; the last one is the candidate's."""
    timings_s: dict[str, float] = Field(default_factory=dict)
    """Stage to seconds."""
