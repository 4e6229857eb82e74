"""Several GPUs of one host: speed beside one GPU, equal losses, and what is left when a process dies.

    python tests/bench/scaling.py speed DIR     the 7b shape, packed 4 x 2048 a GPU, every strategy, 1 and 2 GPUs
    python tests/bench/scaling.py speed DIR --shape tiny --rows 2 --seq 64        the same on CPU processes
    python tests/bench/scaling.py equal DIR     equal losses on 1 and 2, resumed 1 -> 2, killed, and 2 -> 1

Everything goes through `launch.train`, as a recipe would: torchrun, the recipe's strategy, checkpoints. Weights and
tokens are random. DIR keeps the checkpoints of random weights. Rows are printed as JSON and appended to `--results`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_core.artifacts import ModelSnapshot, PreparedDataset
from qlora_core.errors import QloraError
from qlora_core.events import Event, Metrics, Note
from qlora_core.modeling.bases import quantization_of
from qlora_core.modeling.load import read_architecture
from qlora_core.modeling.rows import TokenRow, write_token_rows
from qlora_core.recipe import Lora, TrainRecipe
from qlora_core.training.launch import train
from tests.tiny import write_model

WARM_UP_STEPS = 4
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")
STEPS = {"whole": 8, "hand_over": 2, "kill": 5, "back": 6}
"""Of the equal runs: how many, after which two processes take over, where one is killed, and when one is left again."""


class Heard:
    """Keeps what a run reports, and may do something at a step."""

    def __init__(self, at_step: int = 0, action: Any = None) -> None:
        self.metrics: list[Metrics] = []
        self.notes: list[str] = []
        self._at_step, self._action = at_step, action

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.message)
        if isinstance(event, Metrics):
            self.metrics.append(event)
            if event.step == self._at_step:
                self._action()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["speed", "equal"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--nf4", action="store_true", help="a checkpoint that is quantized already, for the 32b shape")
    parser.add_argument("--points", nargs="+", default=["ddp:1", "ddp:2", "zero2:2", "zero3:2"], help="STRATEGY:GPUS")
    parser.add_argument("--rows", type=int, default=4, help="rows of a GPU's step")
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--results", type=Path, default=Path("scaling.jsonl"))
    args = parser.parse_args()
    for row in speed(args) if args.verb == "speed" else equal(args.folder):
        row = row | where()
        print("RESULT", json.dumps(row), flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def speed(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """One row a point, with the rate beside that of one GPU."""
    base, alone = random_base(args.folder, args.shape, args.nf4), 0.0
    for point in args.points:
        strategy, gpus = point.split(":")
        row = time_point(args, base, strategy, int(gpus))
        alone = alone or row.get("tokens_per_s", 0.0)
        yield row | ({"scaling": round(row["tokens_per_s"] / alone, 3)} if "tokens_per_s" in row else {})


def time_point(args: argparse.Namespace, base: ModelSnapshot, strategy: str, gpus: int) -> dict[str, Any]:
    into = fresh(args.folder / "speed")
    rows = random_rows(into / "rows", args.rows * gpus, args.seq)
    recipe = TrainRecipe(
        lora=Lora(rank=16, alpha=16),
        epochs=args.steps,
        effective_batch_rows=args.rows * gpus,
        micro_batch_size=args.rows,
        learning_rate=1e-5,
        loss_spike=None,
        activation_memory="small" if strategy == "zero3" else "auto",
        processes=gpus,
        strategy=strategy,
    )
    row = {"shape": args.shape, "strategy": strategy, "gpus": gpus, "rows_per_gpu": args.rows, "seq_len": args.seq}
    heard, began = Heard(), time.perf_counter()
    try:
        train(recipe, 0, base, rows, into / "run", heard)
    except QloraError as error:
        return row | {"error": str(error)[-1500:]}
    tokens = args.rows * gpus * args.seq
    seconds = [tokens / event.values["tokens_per_s"] for event in heard.metrics[WARM_UP_STEPS:-1]]
    return row | {
        "step_ms": round(statistics.mean(seconds) * 1e3, 1),
        "tokens_per_s": round(tokens / statistics.mean(seconds)),
        "peak_gib": peaks(heard),
        "loss": round(heard.metrics[-1].values["loss"], 4),
        "whole_run_s": round(time.perf_counter() - began, 1),
        "notes": [note for note in heard.notes if "engine" in note],
    }


def equal(folder: Path):  # type: ignore[no-untyped-def]
    """Loss curves of a small model; on one, on two, and through changes and a kill."""
    at, base = STEPS, random_base(folder, "tiny")
    rows = random_rows(fresh(folder / "equal") / "rows", 32, 128)

    def go(name: str, strategy: str, processes: int, report: Heard) -> Path:
        into = folder / "equal" / name
        train(small_recipe(strategy, processes), 0, base, rows, into, report)
        return into

    one = go("one", "ddp", 1, Heard())
    yield {"test": "equal losses", "run": "2 processes, zero2"} | difference(go("zero2", "zero2", 2, Heard()), one)
    two = start_from(one, at["hand_over"], folder / "equal" / "two")
    memory = used_mib()
    killed: list[float] = []
    try:
        go("two", "ddp", 2, Heard(at["kill"], lambda: kill_rank_one(killed)))
    except QloraError:
        ended_s = time.monotonic() - killed[0]
    left = [process.pid for process in ranks()]
    time.sleep(1)
    yield {"test": "killed", "ended_s": round(ended_s, 1), "left": left, "used_mib": [memory, used_mib()]}
    go("two", "ddp", 2, Heard())
    yield {"test": "equal losses", "run": "1 -> 2 processes, one killed, resumed on 2"} | difference(two, one)
    back = start_from(two, at["back"], folder / "equal" / "back")
    go("back", "ddp", 1, Heard())
    yield {"test": "equal losses", "run": "2 -> 1 processes"} | difference(back, one)


def small_recipe(strategy: str, processes: int) -> TrainRecipe:
    return TrainRecipe(
        lora=Lora(rank=8, alpha=16),
        epochs=10,
        max_steps=STEPS["whole"],
        effective_batch_rows=8,
        micro_batch_size=4,
        learning_rate=1e-3,
        checkpoint_every_steps=2,
        keep_checkpoints=9,
        processes=processes,
        strategy=strategy,
    )


def difference(got: Path, expected: Path) -> dict[str, Any]:
    curves = [
        [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]
        for folder in (got, expected)
    ]
    worst = max(abs(a - b) for a, b in zip(*curves, strict=True))
    return {"largest_difference": worst, "losses": curves[0]}


def start_from(done: Path, step: int, into: Path) -> Path:
    """A work directory as a run leaves it that was killed soon after `step`."""
    name = f"step-{step:08d}"
    shutil.copytree(done / "checkpoints" / name, into / "checkpoints" / name)
    shutil.copy(done / "history.jsonl", into)
    return into


def kill_rank_one(killed: list[float]) -> None:
    os.kill(next(process.pid for process in ranks() if process.environ()["RANK"] == "1"), signal.SIGKILL)
    killed.append(time.monotonic())


def ranks() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "RANK" in p.environ()]


def used_mib() -> list[int]:
    """Memory in use on every GPU, whoever uses it; empty without GPUs."""
    return [int(line) for line in asked_of_gpus("memory.used")]


def asked_of_gpus(what: str) -> list[str]:
    """One answer a GPU; not through torch, which would take memory there for this process."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def peaks(heard: Heard) -> list[float]:
    """Of every process."""
    said = [re.search(r"peak memory of each process: ([\d., ]+) GiB", note) for note in heard.notes]
    found = next(match for match in said if match)
    return [float(value) for value in found[1].split(", ")]


def random_base(folder: Path, shape: str, nf4: bool = False) -> ModelSnapshot:
    path = folder / shape
    if not (path / "config.json").exists():
        tokenizer = write_model(fresh(folder / "tokenizer"))
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            (tokenizer / file).unlink()
        maker = [sys.executable, str(Path(__file__).with_name("training_speed.py")), "make", shape]
        maker += ["--tokenizer", str(tokenizer), "--out", str(folder), *(["--nf4"] if nf4 else [])]
        subprocess.run(maker, check=True)  # its GPU memory ends with it
    return ModelSnapshot(
        path=path,
        source=shape,
        revision="1",
        digest="0" * 64,
        architecture=read_architecture(path),
        quantization=quantization_of(json.loads((path / "config.json").read_text())),
    )


def random_rows(folder: Path, count: int, length: int) -> PreparedDataset:
    """Random tokens, loss on every one."""
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(5, 300, (count, length), dtype=np.int32)
    rows = [TokenRow(str(number), row, np.ones(length, np.uint8)) for number, row in enumerate(ids)]
    write_token_rows(folder / "train.arrow", rows)
    write_token_rows(folder / "evaluation.arrow", [TokenRow("0", ids[0, :32], np.ones(32, np.uint8))])
    return PreparedDataset(
        path=folder,
        digest="1" * 64,
        tokenizer_digest="",
        template_digest="",
        train_rows=count,
        evaluation_rows=1,
        dropped={},
        train_tokens=count * length,
        trained_tokens=count * (length - 1),
        evaluation_trained_tokens=31,
        longest_row_tokens=length,
        forgetting_tokens=0,
        packing_efficiency=1.0,
    )


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def where() -> dict[str, Any]:
    installed = {name: _version(name) for name in PACKAGES}
    return {
        "device": ", ".join(asked_of_gpus("name")) or "CPU",
        "versions": installed,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
