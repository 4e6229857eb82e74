"""Many retrainings submitted at once to a pool of two slots, on a team's servers: `make queue N=50`.

At the end every one of them has ended well, with a champion of its own; never more than the slots ran at a time, and
they began in the order in which they were submitted.
"""

import argparse
import json
import os
import sys
import time
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient

from tests.members import flow_run, versions
from tests.team import Team, team, wait_for, worker
from tests.tiny import write_recipe

SLOTS = 2
PATIENCE_S = 120
"""For each of them."""


def submit(us: Team, recipes: list[dict[str, Any]]) -> list[str]:
    """Fill in the form once for each; the flow runs' ids."""
    us.ask("/work_pools/", name="gpu", type="process", concurrency_limit=SLOTS)
    us.prefect("deploy", "--name", "form", "--prefect-file", "deployments/prefect.yaml")
    (form,) = us.ask("/deployments/filter", deployments={"name": {"any_": ["form"]}})
    path = f"/deployments/{form['id']}/create_flow_run"
    return [us.ask(path, state={"type": "SCHEDULED"}, parameters={"recipe": recipe})["id"] for recipe in recipes]


def recipes_in(folder: Path, count: int) -> list[dict[str, Any]]:
    """Of one model and its rows, with a name and a learning rate each."""
    recipe = json.loads(write_recipe(folder, evaluation={"metrics": ["loss"]}).read_text())
    recipe["model"]["path"] = str(folder / "model")
    for source, file in ((recipe["data"]["rows"][0], "rows.json"), (recipe["data"]["forgetting"][0], "text.txt")):
        source["path"] = str(folder / file)
    rates = [round(0.01 + number * 1e-4, 4) for number in range(count)]
    return [
        {**recipe, "name": name_of(number), "train": {**recipe["train"], "learning_rate": rate}}
        for number, rate in enumerate(rates)
    ]


def name_of(number: int) -> str:
    return f"many-{number}"


def progress(us: Team, runs: list[str], seen: list[int]) -> bool:
    """Say how many have ended, whenever that has changed; whether all have."""
    found = us.ask("/flow_runs/filter", flow_runs={"id": {"any_": runs}})  # one question: asking costs the runs time
    ended = sum(run["end_time"] is not None for run in found)
    if ended not in seen:
        seen.append(ended)
        print(f"{time.strftime('%H:%M:%S')} {ended} of {len(runs)} ended", flush=True)  # noqa: T201
    time.sleep(5)
    return ended == len(runs)


def check(us: Team, ids: list[str]) -> int:
    """What must hold at the end; returns how many ran at a time, at most."""
    runs = [flow_run(us, run) for run in ids]
    assert {run["state_name"] for run in runs} == {"Completed"}, [run["state"] for run in runs]
    changes = sorted([(run["start_time"], 1) for run in runs] + [(run["end_time"], -1) for run in runs])
    at_a_time = max(accumulate(change for _, change in changes))
    assert at_a_time <= SLOTS, at_a_time
    begun = sorted(range(len(runs)), key=lambda number: runs[number]["start_time"])
    assert all(abs(place - number) < SLOTS for place, number in enumerate(begun)), begun
    for number in range(len(runs)):
        assert [version.tags["qlora.verdict"] for version in versions(us, name_of(number))] == ["promoted"], number
    client = MlflowClient(us.mlflow_url)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert not client.search_runs(experiments, "attributes.status = 'RUNNING'")
    return at_a_time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50)
    count = parser.parse_args().count
    with TemporaryDirectory(prefix="qlora-many-") as temporary, team(Path(temporary)) as us:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            os.environ[name] = us.environment[name]
        ids = submit(us, recipes_in(Path(temporary) / "recipe", count))
        with worker(us, "gpu", "one"), worker(us, "gpu", "two"):
            seen: list[int] = []
            wait_for("end of all", lambda: progress(us, ids, seen), PATIENCE_S * count)
            at_a_time = check(us, ids)
            print(f"{count} submitted at once: all ended well, in their order, {at_a_time} at a time")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
