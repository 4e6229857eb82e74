"""The front door: score one model in a process of its own, and compare scored models in a report."""

from pathlib import Path

from qlora_core.artifacts import EvaluationReport, ModelScores, PreparedDataset, PromotionDecision
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.metrics import find_metrics, known_metrics
from qlora_core.evaluation.records import EvaluationSpec, ReportContext
from qlora_core.events import Report
from qlora_core.process import run_child
from qlora_core.recipe import EvaluationRecipe

VERSION = 1
KEEP = ("rows.jsonl", "answers.jsonl")
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

    Writes `rows.jsonl` (loss of each row) and, when a metric looks at answers, `answers.jsonl`.

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

    models = {"base": base, "candidate": candidate} | ({"champion": champion} if champion else {})
    for name, scores in models.items():
        if (scores.data_digest, scores.seed, scores.rows) != (dataset.digest, candidate.seed, candidate.rows):
            raise EvaluationError(
                f"the {name} was scored on {scores.rows} rows of data {scores.data_digest[:12]} (seed {scores.seed}), "
                f"the candidate on {candidate.rows} rows of {dataset.digest[:12]} (seed {candidate.seed}); "
                "scores compare only on the same rows, evaluate it again"
            )
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
    )
    write_report(report, models, decision, dataset, context, into)
    return report


__all__ = ["KEEP", "VERSION", "ReportContext", "compare", "evaluate", "known_metrics"]
