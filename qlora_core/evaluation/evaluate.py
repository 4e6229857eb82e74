"""The front door: score one model in a process of its own, and compare scored models in a report."""

from pathlib import Path
from typing import Any

from qlora_core.artifacts import (
    Differences,
    EvaluationReport,
    Intervals,
    ModelScores,
    PreparedDataset,
    PromotionDecision,
)
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.bootstrap import interval_of_difference
from qlora_core.evaluation.metrics import ROUNDING_COST, check_metrics, find_metrics, known_metrics
from qlora_core.evaluation.records import EvaluationSpec, ReportContext
from qlora_core.evaluation.scored import FILES, read_rows, row_sums
from qlora_core.events import Report
from qlora_core.process import run_child
from qlora_core.recipe import EvaluationRecipe
from qlora_core.store import sha256_of_file

VERSION = 2
REPORT_VERSION = 4
"""Of the page and its data; scores stay what they are when only these change."""
KEEP = FILES
"""What belongs to the scores of a model; the child's own folder does not."""


def evaluate(
    recipe: EvaluationRecipe,
    seed: int,
    model_path: Path,
    model_digest: str,
    dataset: PreparedDataset,
    into: Path,
    report: Report,
) -> ModelScores:
    """Score a model in full precision on the data set's evaluation rows.

    The loss is always scored; what else is, the recipe's metrics say. `into` gets one file of JSON lines for the
    losses, one for the answers if a metric looks at them, and so on (see `scored.py`).

    Raises:
        RecipeError: the recipe names a metric that does not exist.
        EvaluationError: the model cannot be scored on this data.
        ChildError: the child process died.
    """
    find_metrics(recipe.metrics)
    spec = EvaluationSpec(
        recipe=recipe, seed=seed, model_path=model_path, model_digest=model_digest, dataset=dataset, into=into
    )
    record = run_child("qlora_core.evaluation.worker:run", spec, into / "child", report)
    return ModelScores.model_validate(record)


def decisive(recipe: EvaluationRecipe) -> dict[str, Any]:
    """What of the recipe decides scores: all but where the files of the harness are, and what is in them."""
    part = recipe.model_dump(mode="json", exclude={"harness": {"folder"}})
    if recipe.harness is not None:
        folder = recipe.harness.folder
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")
        part["harness"]["files"] = {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files}
    return part


def differences(base: ModelScores, candidate: ModelScores, champion: ModelScores | None) -> Differences:
    """By model and score: the 95 % interval of the candidate's minus that model's, by paired bootstrap over rows.

    Scores that are not sums over rows, such as times, have none.

    Raises:
        EvaluationError: the models were not scored on the same rows.
    """
    found: Differences = {"base": _intervals(candidate, base, "base")}
    if champion is not None:
        found["champion"] = _intervals(candidate, champion, "champion")
    return found


def compare(
    base: ModelScores,
    candidate: ModelScores,
    champion: ModelScores | None,
    decision: PromotionDecision,
    dataset: PreparedDataset,
    context: ReportContext,
    into: Path,
) -> EvaluationReport:
    """Write `report.html` (one self-contained page) and `report.json` (the same as data).

    Raises:
        EvaluationError: the models were not scored on the same rows.
    """
    from qlora_core.evaluation.report import write_report  # matplotlib takes a second to import

    report = EvaluationReport(
        path=into,
        base=base.scores,
        candidate=candidate.scores,
        champion=champion.scores if champion else None,
        base_digest=base.model_digest,
        candidate_digest=candidate.model_digest,
        champion_digest=champion.model_digest if champion else None,
        data_digest=dataset.digest,
        rows=candidate.rows,
        differences=differences(base, candidate, champion),
        directions=candidate.directions,
    )
    models = {"base": base, "candidate": candidate} | ({"champion": champion} if champion else {})
    write_report(report, models, decision, dataset, context, into)
    return report


def _intervals(candidate: ModelScores, other: ModelScores, name: str) -> Intervals:
    if (other.data_digest, other.seed, other.rows) != (candidate.data_digest, candidate.seed, candidate.rows):
        raise EvaluationError(
            f"the {name} was scored on {other.rows} rows of data {other.data_digest[:12]} (seed {other.seed}), "
            f"the candidate on {candidate.rows} rows of {candidate.data_digest[:12]} (seed {candidate.seed}); "
            "scores compare only on the same rows, evaluate it again"
        )
    ours, theirs = row_sums(read_rows(candidate.path)), row_sums(read_rows(other.path))
    return {score: interval_of_difference(ours[score], theirs[score]) for score in ours if score in theirs}


__all__ = [
    "KEEP",
    "REPORT_VERSION",
    "ROUNDING_COST",
    "VERSION",
    "ReportContext",
    "check_metrics",
    "compare",
    "decisive",
    "differences",
    "evaluate",
    "known_metrics",
]
