"""How long `qlora rollback` takes, from the command to the end of its process, beside the bare import of MLflow.

    python tests/bench/rollback.py [--team] [--repeats 5]

With `--team`, against servers as a team has them: MLflow with users and Prefect, both on PostgreSQL, the lock a
concurrency limit of Prefect. Without: an embedded registry in a new home. The result, one JSON line, is printed and
appended to tests/bench/results/rollback.jsonl.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_core.limits import usable_cpus

RESULTS = Path(__file__).parent / "results" / "rollback.jsonl"
MODEL = "rolled-back"


def main() -> None:
    """Make two champions, roll back again and again, write the result."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir="/tmp") as home, _servers(Path(home), arguments.team) as where:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        environment = {**kept, "QLORA_HOME": home, **where}
        os.environ.clear()
        os.environ.update(environment)
        _make_two_champions()
        imports = [_timed(["-c", "import mlflow"], environment) for _ in range(arguments.repeats)]
        rollbacks = [_timed(["-m", "flows.cli", "rollback", MODEL], environment) for _ in range(arguments.repeats)]
    result = {
        "bench": "rollback",
        "registry": "MLflow and Prefect servers on PostgreSQL" if arguments.team else "sqlite",
        "device": f"{platform.machine()} CPU, {usable_cpus()} cores",
        "load_average": round(os.getloadavg()[0], 1),
        "date": datetime.now(UTC).date().isoformat(),
        "mlflow": version("mlflow"),
        "prefect": version("prefect"),
        "wall_s": [round(wall, 2) for wall, _ in rollbacks],
        "cpu_s": round(median(cpu for _, cpu in rollbacks), 2),
        "import_mlflow_cpu_s": round(median(cpu for _, cpu in imports), 2),
        "of_import": round(median(cpu for _, cpu in rollbacks) / median(cpu for _, cpu in imports), 2),
    }
    line = json.dumps(result)
    print(line)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


@contextmanager
def _servers(folder: Path, wanted: bool) -> Iterator[dict[str, str]]:
    """What a member's shell holds to reach a team's servers, which run meanwhile; nothing if none are wanted."""
    if not wanted:
        yield {}
        return
    from tests.team import team

    with team(folder) as us:
        yield {name: value for name, value in us.environment.items() if name.startswith(("PREFECT_", "MLFLOW_"))}


def _make_two_champions() -> None:
    from tasks import moves
    from tasks.registry import ModelRegistry
    from tasks.settings import Settings

    settings = Settings()
    settings.configure_libraries()
    settings.make_home()
    registry, author = ModelRegistry(settings), moves.me("bench")
    registry.client.create_registered_model(MODEL)
    for number, digest in enumerate("ab", start=1):
        tags = {"qlora.key": digest, "qlora.model_digest": digest}
        registry.client.create_model_version(MODEL, source="s3://nowhere/model", tags=tags)
        moves.promote(registry, MODEL, number, None if number == 1 else "a", author, "bench")


def _timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds on the clock, and of CPU."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="qlora rollback, beside the import of MLflow")
    parser.add_argument("--team", action="store_true", help="against servers as a team has them")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
