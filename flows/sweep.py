"""The flow that tries several recipes and takes the best of them to its gates."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from pydantic import Field

from flows.retrain import candidate, trained
from flows.scheduled import Override
from flows.shutdown import keeps_signals
from qlora_core.artifacts import Record
from qlora_core.recipe import Recipe, load_recipe
from qlora_core.sweep import Trial, best_of, overrides, parse_space
from tasks.cancelling import ends_when_cancelled
from tasks.orphans import end_orphans
from tasks.promote_task import Outcome
from tasks.search import search
from tasks.settings import Settings
from tasks.sweeping import LOSS, Attempt, record, refuse_incomparable, run_elsewhere
from tasks.tracking import Retraining, Tracker
from tasks.unchanged import settled


class Swept(Record):
    """What a sweep has found."""

    trials: tuple[Trial, ...]
    best: Trial
    outcome: Outcome | None
    """What the gates said of the best; None if they had judged it before."""


@flow(name="sweep", flow_run_name="sweep {recipe}", persist_result=False)
def sweep(
    recipe: Path,
    grid: tuple[Override, ...] = (),
    ranges: tuple[Override, ...] = (),
    trials: Annotated[int, Field(ge=1)] | None = None,
    set: tuple[Override, ...] = (),  # noqa: A002 - as the option is called
    force: bool = False,
    on: str | None = None,
    at_once: Annotated[int, Field(ge=1)] = 1,
) -> Swept:
    """Train every point of a grid, or as many as Optuna may propose, and judge the one of the lowest evaluation loss.

    Args:
        recipe: a file that the worker can read.
        grid: keys with the values to try, such as `train.learning_rate=1e-4,2e-4`.
        ranges: keys with a lowest and a highest number, such as `train.lora.rank=8..64`.
        trials: how many to propose; left empty, the whole grid is tried.
        set: what all trials have in common, such as `train.epochs=2`.
        force: judge the best again even if nothing has changed.
        on: the deployment that runs a trial, such as `trial/gpu`; left empty, trials run here, one after another.
        at_once: how many trials may run at the same time there.
    """
    settings, base = Settings(), load_recipe(recipe, set)
    space = parse_space(grid, ranges, base, trials is not None)
    refuse_incomparable(space, lambda varied: load_recipe(recipe, (*set, *varied)))  # before the first training
    points = search(space, trials, base.seed)
    tracker = Tracker(settings)
    end_orphans(tracker)
    watched = ends_when_cancelled(str(flow_run.id), has_worker=bool(deployment.id))
    run = tracker.begin(base, str(flow_run.id), flow_run.ui_url, kind="sweep", space=space)
    with keeps_signals(), watched, tracker.final_status(run.parent_run_id):
        done: list[Trial] = []
        while asked := points.ask(at_once if on else 1):
            recipes = [load_recipe(recipe, (*set, *overrides(point))) for point in asked]
            batch = [
                Attempt(number=len(done) + at, values=point, recipe=made)
                for at, (point, made) in enumerate(zip(asked, recipes, strict=True), start=1)
            ]
            done += run_elsewhere(on, batch, tracker, run) if on else [_try(attempt, run) for attempt in batch]
            points.tell([trial.loss for trial in done[-len(batch) :]])
            record(tracker, run, done)
        best = best_of(done)
        chosen = load_recipe(recipe, (*set, *overrides(best.values)))
        judged = not force and settled(chosen, settings)
        outcome = None if judged else candidate(chosen, tracker, under=run.parent_run_id)
    return Swept(trials=tuple(done), best=best, outcome=outcome)


@flow(name="trial", flow_run_name="trial {number}", persist_result=False)
def trial(recipe: Recipe, number: int, sweep_run_id: str) -> tuple[float, str]:
    """Train one recipe of a sweep.

    Args:
        recipe: what to train.
        number: which trial it is.
        sweep_run_id: the MLflow run of the sweep.

    Returns:
        Its evaluation loss (nats a token) and its MLflow run.
    """
    tracker = Tracker(Settings())
    run = tracker.begin(recipe, str(flow_run.id), flow_run.ui_url, kind="trial", under=sweep_run_id)
    with keeps_signals(), tracker.final_status(run.parent_run_id):
        _, _, adapter = trained(run)
        tracker.log_final(run.parent_run_id, {LOSS: adapter.evaluation_loss, "train_loss": adapter.train_loss})
        return adapter.evaluation_loss, run.parent_run_id


def _try(attempt: Attempt, run: Retraining) -> Trial:
    """One trial in this process; its failure is a result too, and the others go on."""
    state = trial(attempt.recipe, attempt.number, run.parent_run_id, return_state=True)
    if not state.is_completed():
        get_run_logger().warning("trial %d failed: %s", attempt.number, state.message)
        return attempt.ended(None, state.message or str(state.type))
    loss, run_id = state.result()
    return attempt.ended(loss, "", run_id)
