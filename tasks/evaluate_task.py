"""Evaluate: base, candidate and champion on the same rows, and the report that compares them."""

from datetime import UTC, datetime
from pathlib import Path

from prefect import State, task
from prefect.artifacts import create_markdown_artifact

from qlora_core.artifacts import (
    Adapter,
    EvaluationReport,
    MergedModel,
    ModelScores,
    ModelSnapshot,
    PreparedDataset,
    PromotionDecision,
)
from qlora_core.evaluation import evaluate as evaluation
from qlora_core.events import Report
from qlora_core.gates import decide
from qlora_core.recipe import Recipe
from tasks.fetching import model_folder
from tasks.foreign import with_digest
from tasks.keys import report_key, scores_key
from tasks.progress import if_prefect_listens
from tasks.registry import CHAMPION, PREVIOUS, ModelRegistry, Version
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining


@task(name="evaluate", task_run_name="evaluate {retraining.recipe.name}", timeout_seconds=6 * 3600, **RETRYING)
def evaluate(
    retraining: Retraining, base: ModelSnapshot, dataset: PreparedDataset, adapter: Adapter, merged: MergedModel
) -> State[EvaluationReport]:
    """Score what was not scored on these rows before, and compare."""
    recipe = retraining.recipe
    with Stage("evaluate", retraining) as stage:
        registry = ModelRegistry(stage.settings)
        champion = _rival(registry, recipe.name, merged)
        if champion is not None:
            champion = with_digest(registry, champion)
        champion_digest = champion.model_digest if champion else None

        def produce(into: Path, _: Report) -> EvaluationReport:
            base_scores = _scores(stage, base.merge_base.path, base.merge_base.digest, dataset)
            candidate = _with_rounding(_scores(stage, merged.path / "model", merged.digest, dataset), merged)
            rival = _champion_scores(stage, registry, champion, dataset)
            decision = decide(
                recipe.promotion.gates,
                candidate.scores,
                base_scores.scores,
                rival.scores if rival else None,
                evaluation.differences(base_scores, candidate, rival),
                candidate.directions,
            )
            context = _context(stage, base, dataset, adapter, merged)
            return evaluation.compare(base_scores, candidate, rival, decision, dataset, context, into)

        state = stage.run(
            report_key(recipe, merged.digest, champion_digest, dataset),
            EvaluationReport,
            produce,
            params=recipe.evaluation,
            describe=_describe,
            line=_line,
        )
        _publish(stage, state.result(), recipe)
        return state


def decision_of(recipe: Recipe, report: EvaluationReport) -> PromotionDecision:
    """What the recipe's gates say about a report."""
    return decide(
        recipe.promotion.gates, report.candidate, report.base, report.champion, report.differences, report.directions
    )


def before_after(report: EvaluationReport) -> str:
    """The scores as a Markdown table."""
    models = [("base", report.base), ("candidate", report.candidate)]
    if report.champion is not None:
        models.append(("champion", report.champion))
    lines = ["| metric | " + " | ".join(name for name, _ in models) + " |", "|---" * (len(models) + 1) + "|"]
    for metric in report.candidate:
        cells = (f"{scores[metric]:.4g}" if metric in scores else "" for _, scores in models)
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rival(registry: ModelRegistry, name: str, merged: MergedModel) -> Version | None:
    """The champion to beat; when this very model is champion already, the one that it replaced."""
    at_aliases = (registry.at_alias(name, alias) for alias in (CHAMPION, PREVIOUS))
    return next((version for version in at_aliases if version and version.model_digest != merged.digest), None)


def _scores(stage: Stage, model: Path, digest: str, dataset: PreparedDataset) -> ModelScores:
    recipe = stage.retraining.recipe
    return stage.part(
        "scores",
        scores_key(recipe, digest, dataset),
        ModelScores,
        lambda into, report: evaluation.evaluate(recipe.evaluation, recipe.seed, model, digest, dataset, into, report),
        keep=evaluation.KEEP,
    )


def _with_rounding(scores: ModelScores, merged: MergedModel) -> ModelScores:
    """The candidate's scores and what rounding its weights has cost, which only its merge could measure."""
    costs = merged.proof.rounding
    found = {evaluation.ROUNDING_COST: costs[-1].cost} if costs else {}
    return scores.model_copy(update={"scores": scores.scores | found})


def _champion_scores(
    stage: Stage, registry: ModelRegistry, champion: Version | None, dataset: PreparedDataset
) -> ModelScores | None:
    """The champion on these rows: from the store if it was scored on them, else from its files in the registry."""
    if champion is None:
        return None
    digest = champion.identity
    known = stage.store.find(ModelScores, "scores", scores_key(stage.retraining.recipe, digest, dataset))
    if known is not None:
        return known
    folder = model_folder(registry, champion)
    return _scores(stage, folder, digest, dataset)


def _context(
    stage: Stage, base: ModelSnapshot, dataset: PreparedDataset, adapter: Adapter, merged: MergedModel
) -> evaluation.ReportContext:
    recipe = stage.retraining.recipe
    return evaluation.ReportContext(
        title=f"Retraining of {recipe.name}",
        recipe_name=recipe.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        curve=adapter.path / "history.jsonl",
        lineage=(
            ("base model", f"{base.source} · {base.digest[:12]}"),
            ("data", dataset.digest[:12]),
            ("adapter", adapter.digest[:12]),
            ("merged model", merged.digest[:12]),
            ("MLflow run", stage.retraining.parent_run_id),
            *((f"loss of {name.replace('_', ' ')}", f"{loss:.4f}") for name, loss in merged.proof.losses.items()),
        ),
        needs_approval=recipe.promotion.approval == "manual",
        rounding=merged.proof.rounding,
        timings_s=stage.tracker.stage_seconds(stage.retraining),
    )


def _describe(report: EvaluationReport) -> Described:
    models = {"base": report.base, "candidate": report.candidate, "champion": report.champion or {}}
    return Described(
        metrics={f"{model}.{metric}": value for model, scores in models.items() for metric, value in scores.items()},
        tags={
            "qlora.digest": report.digest,
            "qlora.data_digest": report.data_digest,
            "qlora.candidate_digest": report.candidate_digest,
            "qlora.champion_digest": report.champion_digest or "none",
        },
        artifacts=((report.path / "report.html", ""), (report.path / "report.json", "")),
        dataset=("evaluation rows", report.data_digest, report.path.as_uri()),
        read_for="evaluation",
    )


def _publish(stage: Stage, report: EvaluationReport, recipe: Recipe) -> None:
    """Put the report where a person looks first: on the parent run, and on the Prefect run as Markdown."""
    parent = stage.retraining.parent_run_id
    stage.tracker.client.log_artifact(parent, str(report.path / "report.html"))
    stage.tracker.tag(parent, {"qlora.data_digest": report.data_digest})
    stage.tracker.log_final(parent, report.candidate)
    decision = decision_of(recipe, report)
    verdict = "passes its gates" if decision.promote else "does not pass its gates"
    text = f"# {recipe.name} {verdict}\n\n{decision.reason}\n\n{before_after(report)}\n\nMLflow run `{parent}`"
    with if_prefect_listens():
        create_markdown_artifact(text, key="qlora-evaluation", description="scores before and after")


def _line(report: EvaluationReport) -> str:
    against = "base" if report.champion is None else "base and champion"
    return f"loss {report.base['loss']:.3f} to {report.candidate['loss']:.3f} on {report.rows} rows, against {against}"
