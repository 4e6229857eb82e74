"""Promote: the candidate becomes `champion` if it passed every gate, and a person agrees where the recipe says so."""

from prefect import State, task
from prefect.states import Completed

from qlora_core.artifacts import EvaluationReport, PromotionDecision, Record
from qlora_core.events import Note
from qlora_core.recipe import Recipe
from tasks import approval, moves
from tasks.evaluate_task import decision_of
from tasks.moves import Author
from tasks.publishing import announce
from tasks.registry import CHAMPION, ModelRegistry, Version
from tasks.stage import RETRYING, Stage
from tasks.tags import AWAITING, KEY, PROMOTED, REJECTED
from tasks.tracking import Described, Retraining


class Outcome(Record):
    """How a retraining ended."""

    name: str
    version: int
    verdict: str
    """`promoted`, `rejected`, or `awaiting approval`."""
    decision: PromotionDecision
    report: EvaluationReport
    parent_run_id: str


@task(name="promote", task_run_name="promote {retraining.recipe.name}", timeout_seconds=3600, **RETRYING)
def promote(retraining: Retraining, report: EvaluationReport, version: Version) -> State[Outcome]:
    """Ask the gates, move the alias or ask for approval, and write down why."""
    recipe = retraining.recipe
    decision = decision_of(recipe, report)
    with Stage("promote", retraining) as stage:
        registry = ModelRegistry(stage.settings)
        for edit in moves.edits_by_hand(registry, recipe.name):
            stage.report(Note(message=edit))
        with stage.recorded(version.tags.get(KEY, "")) as run:
            run.params({"gates": [gate.model_dump(mode="json") for gate in recipe.promotion.gates]})
            verdict = _settle(registry, recipe, decision, report, version)
            run.describe(_describe(decision, verdict))
        if verdict == AWAITING and not stage.settings.embedded_prefect:
            approval.open_form(registry, registry.version(version.name, version.number))
        if not stage.settings.embedded_prefect:
            announce(version, verdict, decision.reason)
        stage.tracker.tag(retraining.parent_run_id, {"qlora.verdict": verdict, "qlora.version": str(version.number)})
        stage.display.done(f"version {version.number} {verdict}: {decision.reason}")
    outcome = Outcome(
        name=recipe.name,
        version=version.number,
        verdict=verdict,
        decision=decision,
        report=report,
        parent_run_id=retraining.parent_run_id,
    )
    return Completed(name=verdict.capitalize(), data=outcome)


def _settle(
    registry: ModelRegistry, recipe: Recipe, decision: PromotionDecision, report: EvaluationReport, version: Version
) -> str:
    """Carry out what the gates said; returns the verdict."""
    if not decision.promote:
        registry.decide(version.name, version.number, REJECTED, decision.reason)
        return REJECTED
    if recipe.promotion.approval == "manual" and CHAMPION not in version.aliases:
        approval.ask(registry, version, decision, recipe.promotion.approval_timeout_h)
        return AWAITING
    author = Author(who="the gates", why=decision.reason)
    moves.promote(registry, version.name, version.number, report.champion_digest, author, decision.reason)
    return PROMOTED


def _describe(decision: PromotionDecision, verdict: str) -> Described:
    gates = {f"gate.{gate.metric}.{gate.against}": float(gate.passed) for gate in decision.gates}
    return Described(metrics=gates, tags={"qlora.verdict": verdict, "qlora.reason": decision.reason})
