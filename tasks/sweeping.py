"""What a sweep leaves in MLflow and Prefect: a table and a picture that grow with every trial."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.entities import Metric
from prefect.artifacts import create_table_artifact

from qlora_core.sweep import PICTURE, Trial, best_of, plot
from tasks.tracking import Retraining, Tracker

TABLE = "trials.json"


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
