"""Does a registry that has been filled for years still answer at once?

    python tests/bench/registry_scale.py [--versions 10000] [--results tests/bench/results/registry_scale.jsonl]

A team's servers as they are in production: PostgreSQL, MLflow with authentication, Prefect, S3. One retraining is made
by the program itself; its rows in MLflow's tables are then copied, with other ids, until there are 50,000 runs, 10,000
versions of 501 models (one of them has 1,000) and 1,000,000 metric points. Then the program's own functions are timed,
in a process that has imported them; what starting a process costs is a line of its own.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_core.limits import usable_cpus
from tests.bench.filled import fill
from tests.team import Team, team
from tests.tiny import write_recipe

NAME = "tiny-painter"
PACKAGES = ("mlflow", "prefect", "sqlalchemy", "psycopg")
REPEATS = 5
COUNTED = ("runs", "model_versions", "registered_models", "metrics", "params", "tags", "model_version_tags")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="qlora-scale-", dir="/tmp") as folder, team(Path(folder)) as us:
        recipe = write_recipe(Path(folder) / "recipe", name=NAME)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "QLORA_HOME"):
            os.environ[name] = us.environment[name]
        os.environ |= {key: value for key, value in us.environment.items() if key.startswith("PREFECT_")}
        command(us, "run", recipe)
        write(measure(us, recipe, 1), arguments.results)
        began = time.perf_counter()
        fill(us.database.replace("+psycopg", "") + "/mlflow", NAME, arguments.versions)
        filled_s = round(time.perf_counter() - began)
        write(measure(us, recipe, arguments.versions) | {"filled_in_s": filled_s}, arguments.results)


def write(row: dict[str, Any], results: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if results:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(us: Team, recipe: Path, versions: int) -> dict[str, Any]:
    """Seconds of everything that a retraining and a person ask the registry; counts of what it holds."""
    from flows.show import show_models
    from qlora_core.recipe import load_recipe
    from tasks import moves
    from tasks.registry import ModelRegistry
    from tasks.repairing import repair_registry
    from tasks.settings import Settings
    from tasks.tracking import Tracker
    from tasks.unchanged import settled

    settings, loaded = Settings(), load_recipe(recipe)
    registry, tracker = ModelRegistry(settings), Tracker(settings)
    version = settled(loaded, settings)
    assert version is not None and version.number == 1
    key = version.tags["qlora.key"]
    experiment = tracker.experiment(NAME)
    author = moves.me("a bench")

    def promote() -> None:
        """There and back: two moves of aliases, each under the lock."""
        number = 1 if registry.aliases(NAME)["champion"] != 1 else other
        champion = registry.at_alias(NAME, "champion")
        assert champion is not None
        moves.promote(registry, NAME, number, champion.tags["qlora.model_digest"], author, "a bench")

    asked: dict[str, Callable[[], Any]] = {
        "skip_decision": lambda: settled(loaded, settings),
        "find_by_fingerprint": lambda: registry.find(NAME, key),
        "models": lambda: show_models(None, False, settings),
        "models_of_one_name": lambda: show_models(NAME, False, settings),
        "begin_finds_unfinished": lambda: tracker.search(experiment, "tags.`qlora.kind` = 'retrain'", 1),
        "open_runs": tracker.open_runs,
        "repair_all": lambda: repair_registry(registry),
    }
    if versions > 1:
        other = 2
        asked["promotion"] = promote
    seconds = {name: timed(ask) for name, ask in asked.items()}
    processes = {
        "process: qlora models NAME": timed(lambda: command(us, "models", NAME), 2),
        "process: qlora run RECIPE, nothing has changed": timed(lambda: command(us, "run", recipe), 2),
    }
    with psycopg.connect(us.database.replace("+psycopg", "") + "/mlflow") as connection:
        counts = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # type: ignore[index]
            for table in COUNTED
        }
        (size,) = connection.execute("SELECT pg_database_size('mlflow')").fetchone()  # type: ignore[misc]
        (points,) = connection.execute("SELECT pg_total_relation_size('metrics')").fetchone()  # type: ignore[misc]
    return {
        "rows": counts,
        "database_mb": round(size / 1e6),
        "metrics_mb": round(points / 1e6),
        "seconds": {**seconds, **processes},
        "device": f"{usable_cpus()} cores, all servers on them, PostgreSQL without fsync",
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def timed(ask: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Median and worst seconds of some calls, the first of them included."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            ask()
        seconds.append(time.perf_counter() - began)
    return {
        "median": round(statistics.median(seconds), 3),
        "best": round(min(seconds), 3),
        "worst": round(max(seconds), 3),
    }


def command(us: Team, *words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, words)], env=us.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main()
