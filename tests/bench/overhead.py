"""What orchestration and tracking cost: a flow whose stages are empty, and training with a metric every step.

    python tests/bench/overhead.py flow [--results FILE]                 against a team's running servers
    python tests/bench/overhead.py training DIR --shape 1.5b [--results FILE]
    python tests/bench/overhead.py training DIR --shape tiny --rows 64 --seq 128      on CPUs

`training` logs to a real MLflow server in every second block of steps and not in the others, in one run of the real
launcher, so that both kinds of steps see the same machine. Blocks that were not logged are also compared with each
other: that is how much such a figure can be trusted.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_core.events import Event, Metrics
from qlora_core.limits import usable_cpus
from qlora_core.recipe import Lora, TrainRecipe
from qlora_core.training.launch import train
from tests.bench.scaling import fresh, random_base, random_rows, where
from tests.servers import mlflow_server

FLOWS = 7
BLOCK_STEPS = 10
SETTLING_STEPS = 2
"""Of every block: the first steps after a change, and the one during which the last metric before it is sent."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["flow", "training"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("/tmp/qlora-overhead"))
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    row = (empty_flow() if args.verb == "flow" else training(args)) | where()
    print("RESULT", json.dumps(row), flush=True)
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def empty_flow() -> dict[str, Any]:
    """A retraining whose stages are all there already, forced through all of them, in a process that has imported."""
    from tests.team import team
    from tests.tiny import write_recipe

    with TemporaryDirectory(prefix="qlora-overhead-", dir="/tmp") as folder, team(Path(folder)) as us:
        path = write_recipe(Path(folder) / "recipe")
        os.environ |= {n: v for n, v in us.environment.items() if n.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
        command = [sys.executable, "-m", "flows.cli", "run", str(path), "--force"]
        for _ in range(2):  # the second is compared with the champion that the first has made
            subprocess.run(command, env=us.environment, check=True, capture_output=True)
        began = time.perf_counter()
        subprocess.run(command, env=us.environment, check=True, capture_output=True)
        process_s = time.perf_counter() - began
        seconds, processor_s = flows(path)
    return {
        "bench": "a retraining of 7 empty stages",
        "seconds": {"median": round(statistics.median(seconds), 2), "all": [round(s, 2) for s in seconds]},
        "processor_seconds_of_the_flow": round(processor_s, 2),
        "seconds_with_process_start": round(process_s, 2),
        "servers": "PostgreSQL, Prefect, MLflow with users, S3 on the same cores",
        "cores": usable_cpus(),
        "load": round(os.getloadavg()[0], 1),
    }


def flows(recipe: Path) -> tuple[list[float], float]:
    """Seconds of each flow, and processor seconds that one took in this process."""
    from flows.retrain import retrain
    from qlora_core.recipe import load_recipe
    from tasks.settings import Settings

    Settings().configure_libraries()
    loaded, seconds = load_recipe(recipe), []
    with contextlib.redirect_stdout(io.StringIO()) as said:
        retrain(loaded, True)
        assert said.getvalue().count("reused") >= 6, said.getvalue()
        processor = time.process_time()
        for _ in range(FLOWS):
            began = time.perf_counter()
            retrain(loaded, True)
            seconds.append(time.perf_counter() - began)
    return seconds, (time.process_time() - processor) / FLOWS


def training(args: argparse.Namespace) -> dict[str, Any]:
    """Steps that are logged beside steps that are not."""
    from mlflow import MlflowClient

    from tasks.tracking import StageRun

    base, into = random_base(args.folder, args.shape), fresh(args.folder / "overhead")
    rows = random_rows(into / "rows", args.rows, args.seq)
    recipe = TrainRecipe(
        lora=Lora(rank=16, alpha=16),
        epochs=args.steps,
        effective_batch_rows=args.rows,
        micro_batch_size=args.rows,
        learning_rate=1e-5,
        loss_spike=None,
        checkpoint_every_steps=10 * args.steps,
        processes=1,
    )
    with mlflow_server(into / "mlflow") as url:
        client = MlflowClient(url)
        run = client.create_run(client.create_experiment("overhead"))
        logging = Logging(StageRun(client, run, ""))
        train(recipe, 0, base, rows, into / "run", logging)
        logged = {point.step for point in client.get_metric_history(run.info.run_id, "loss")}
    assert logged == {step for step in range(1, args.steps + 1) if is_logged(step)}
    tokens = args.rows * args.seq
    return logging.compared(tokens) | {"bench": "training", "shape": args.shape, "tokens_a_step": tokens}


def is_logged(step: int) -> bool:
    return step // BLOCK_STEPS % 2 == 1


class Logging:
    """Sends the metrics of every second block of steps to MLflow, and keeps all."""

    def __init__(self, run: Any) -> None:
        self._run, self.metrics, self.request_s = run, [], []

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Metrics):
            return
        self.metrics.append(event)
        if is_logged(event.step):
            began = time.perf_counter()
            self._run.metrics(event)
            self.request_s.append(time.perf_counter() - began)

    def compared(self, tokens: int) -> dict[str, Any]:
        """Step times with and without, by the medians of blocks."""
        blocks: dict[int, list[float]] = {}
        for event in self.metrics[BLOCK_STEPS:-1]:
            if event.step % BLOCK_STEPS >= SETTLING_STEPS:
                blocks.setdefault(event.step // BLOCK_STEPS, []).append(tokens / event.values["tokens_per_s"])
        medians = {number: statistics.median(seconds) for number, seconds in blocks.items()}
        on = np.array([seconds for number, seconds in medians.items() if number % 2 == 1])
        off = np.array([seconds for number, seconds in medians.items() if number % 2 == 0])
        low, high = interval(on, off)
        return {
            "step_ms_logged": round(1e3 * float(np.median(on)), 3),
            "step_ms_not_logged": round(1e3 * float(np.median(off)), 3),
            "overhead_percent": round(100 * float(np.median(on) / np.median(off) - 1), 3),
            "interval_90_percent": [round(100 * low, 3), round(100 * high, 3)],
            "not_logged_against_itself_percent": round(100 * float(np.median(off[::2]) / np.median(off[1::2]) - 1), 3),
            "blocks": [len(on), len(off)],
            "metrics_a_step": len(self.metrics[-2].values),
            "request_ms": round(1e3 * statistics.median(self.request_s), 2),
        }


def interval(on: Any, off: Any) -> tuple[float, float]:
    """Where 90 % of resampled ratios of medians lie, less 1."""
    dice = np.random.default_rng(0)
    ratios = [np.median(dice.choice(on, len(on))) / np.median(dice.choice(off, len(off))) - 1 for _ in range(2000)]
    low, high = np.quantile(ratios, [0.05, 0.95])
    return float(low), float(high)


if __name__ == "__main__":
    main()
