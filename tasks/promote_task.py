"""Promote: the candidate becomes `champion` if it passed every gate."""

from prefect import State, task
from prefect.states import Completed

from qlora_core.artifacts import EvaluationReport, PromotionDecision, Record
from tasks.evaluate_task import decision_of
from tasks.registry import ModelRegistry, Version
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining

PROMOTED, REJECTED = "promoted", "rejected"


class Outcome(Record):
    """How a retraining ended."""

    name: str
    version: int
    decision: PromotionDecision
    report: EvaluationReport
    parent_run_id: str


@task(name="promote", task_run_name="promote {retraining.recipe.name}", timeout_seconds=3600, **RETRYING)
def promote(retraining: Retraining, report: EvaluationReport, version: Version) -> State[Outcome]:
    """Ask the gates, move the alias, and write down why."""
    recipe = retraining.recipe
    decision = decision_of(recipe, report)
    with Stage("promote", retraining) as stage:
        registry = ModelRegistry(stage.settings)
        with stage.recorded(version.tags["qlora.key"]) as run:
            run.params({"gates": [gate.model_dump(mode="json") for gate in recipe.promotion.gates]})
            if decision.promote:
                registry.promote(recipe.name, version.number, report.champion_digest)
            verdict = PROMOTED if decision.promote else REJECTED
            registry.decide(recipe.name, version.number, verdict, decision.reason)
            run.describe(_describe(decision, verdict))
        stage.tracker.tag(retraining.parent_run_id, {"qlora.verdict": verdict, "qlora.version": str(version.number)})
        stage.display.done(f"version {version.number} {verdict}: {decision.reason}")
    outcome = Outcome(
        name=recipe.name,
        version=version.number,
        decision=decision,
        report=report,
        parent_run_id=retraining.parent_run_id,
    )
    return Completed(name="Promoted" if decision.promote else "Rejected", data=outcome)


def _describe(decision: PromotionDecision, verdict: str) -> Described:
    gates = {f"gate.{gate.metric}.{gate.against}": float(gate.passed) for gate in decision.gates}
    return Described(metrics=gates, tags={"qlora.verdict": verdict, "qlora.reason": decision.reason})
