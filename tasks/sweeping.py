"""Trials of a sweep on a deployment's workers, and what a sweep leaves: a table and a picture that grow with it."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.entities import Metric
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelling, Pending

from qlora_core.artifacts import Record
from qlora_core.errors import QloraError, RecipeError
from qlora_core.recipe import Recipe
from qlora_core.store import sha256_of_json
from qlora_core.sweep import PICTURE, Space, Trial, best_of, overrides, plot
from tasks.keys import measured_on
from tasks.tracking import Retraining, Tracker

TABLE = "trials.json"
LOSS = "evaluation_loss"
"""Metric of a trial's MLflow run, by which trials are compared."""
POLL_S = 5.0


class Attempt(Record):
    """A trial that is still to be run."""

    number: int
    values: dict[str, str]
    recipe: Recipe

    def ended(self, loss: float | None, error: str, run_id: str = "") -> Trial:
        """The trial that came of it; a loss that is no number is a failure."""
        if loss is not None and not math.isfinite(loss):
            loss, error = None, f"its loss is {loss}"
        return Trial(number=self.number, values=self.values, loss=loss, error=error, run_id=run_id)


def refuse_incomparable(space: Space, load: Callable[[tuple[str, ...]], Recipe]) -> None:
    """Refuse to vary what trials are measured by.

    Args:
        space: what is varied.
        load: reads the recipe of a trial from its overrides.

    Raises:
        RecipeError: the losses of two trials would not compare, or one is no recipe.
    """
    corners = space.corners()

    def is_measured_alike(points: Sequence[dict[str, str]]) -> bool:
        return len({sha256_of_json(measured_on(load(overrides(point)))) for point in points}) <= 1

    if is_measured_alike(corners):
        return
    alone = {key: [corners[0] | {key: corner[key]} for corner in corners] for key in corners[0]}
    keys = [key for key, points in alone.items() if not is_measured_alike(points)]
    named = " and ".join(keys or corners[0])
    raise RecipeError(
        f"a sweep cannot vary {named}: its trials would be measured on other rows, tokens or scores, and the lowest "
        "loss would say nothing. Fix it for all trials with --set, and vary keys of `train`; where "
        "`data.evaluation_rows` are given, `data.rows` may be varied too"
    )


def run_elsewhere(deployment: str, attempts: Sequence[Attempt], tracker: Tracker, sweep: Retraining) -> list[Trial]:
    """Run trials at the same time as runs of a deployment, and wait for all; what is left at an error is cancelled.

    Raises:
        QloraError: there is no such deployment.
    """
    with get_client(sync_client=True) as client:
        runs: list[FlowRun] = []
        try:
            for attempt in attempts:  # one by one: those that have started are known when a later one cannot
                runs.append(_start(deployment, attempt, sweep))
            while any(not _state(run).is_final() for run in runs):
                time.sleep(POLL_S)
                runs = [client.read_flow_run(run.id) for run in runs]
        except BaseException:
            for run in runs:
                _cancel(client, run)
            raise
    return [_came_of(attempt, run, tracker, sweep) for attempt, run in zip(attempts, runs, strict=True)]


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    """Cancel a trial that is not over; one that cannot be cancelled must not keep the others running."""
    try:
        if not _state(client.read_flow_run(run.id)).is_final():
            client.set_flow_run_state(run.id, Cancelling())
    except Exception as error:
        get_run_logger().warning("%s could not be cancelled (%s); cancel it in Prefect", run.name, error)


def _start(deployment: str, attempt: Attempt, sweep: Retraining) -> FlowRun:
    parameters = {
        "recipe": attempt.recipe.model_dump(mode="json"),
        "number": attempt.number,
        "sweep_run_id": sweep.parent_run_id,
    }
    try:
        run = run_deployment(deployment, parameters=parameters, timeout=0)
    except ObjectNotFound:
        raise QloraError(
            f"there is no deployment {deployment}; `prefect deploy --name gpu --prefect-file deployments/prefect.yaml` "
            "makes trial/gpu"
        ) from None
    assert isinstance(run, FlowRun)
    return run


def _came_of(attempt: Attempt, run: FlowRun, tracker: Tracker, sweep: Retraining) -> Trial:
    state = _state(run)
    if not state.is_completed():
        return attempt.ended(None, state.message or state.name or "it did not end")
    wanted = f"tags.`qlora.kind` = 'trial' AND tags.`prefect.flow_run_id` = '{run.id}'"
    (found,) = tracker.search(sweep.experiment_id, wanted, 1)
    return attempt.ended(found.data.metrics[LOSS], "", found.info.run_id)


def _state(run: FlowRun) -> State:
    return run.state or Pending()


def record(tracker: Tracker, run: Retraining, trials: Sequence[Trial]) -> None:
    """Log the newest trial as a point, and table and picture of all so far."""
    client, newest = tracker.client, trials[-1]
    if newest.loss is not None:
        best = best_of(trials)
        points = {"trial_loss": newest.loss, "best_loss": best.loss or newest.loss}
        metrics = [Metric(name, value, int(time.time() * 1000), newest.number) for name, value in points.items()]
        client.log_batch(run.parent_run_id, metrics=metrics)
        tracker.tag(run.parent_run_id, {"qlora.best": ", ".join(f"{k}={v}" for k, v in best.values.items())})
        with TemporaryDirectory() as folder:
            plot(trials, Path(folder))
            client.log_artifact(run.parent_run_id, str(Path(folder) / PICTURE))
    rows = [_row(trial) for trial in trials]
    # As `log_table` writes it, which would add the rows of a sweep that is repeated to those that are there.
    table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    client.log_dict(run.parent_run_id, table, TABLE)
    tracker.tag(run.parent_run_id, {"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])})
    create_table_artifact(
        key="qlora-sweep", table=rows, description=f"Trials of {run.recipe.name}, by evaluation loss (nats a token)"
    )


def _row(trial: Trial) -> dict[str, object]:
    return {
        "trial": trial.number,
        **trial.values,
        "evaluation loss": trial.loss,
        "error": trial.error,
        "MLflow run": trial.run_id,
    }
