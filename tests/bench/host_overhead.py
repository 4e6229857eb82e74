"""Host time of a training step by the size of the data set: a model that computes nothing, the real loop around it.

    python tests/bench/host_overhead.py [--results FILE] [--rows 1000 20000 200000 2000000]

Rows of 50 to 150 tokens, half of which carry loss; 16 in a step, packed as the fused engine packs them. `step_ms` is
the median over the steps of one run: rows are chosen, split, packed and counted, metrics made and reported;
`step_processor_ms` is the same in processor time, which other work on the machine lengthens less. What is done once is
told apart: opening the files and planning all steps, and counting the tokens of all rows.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator

from qlora_core.artifacts import Architecture, ModelSnapshot, PreparedDataset
from qlora_core.events import Event, Metrics
from qlora_core.modeling.rows import TOKEN_SCHEMA, write_token_rows
from qlora_core.recipe import TrainRecipe
from qlora_core.training.data_parallel import DataParallel
from qlora_core.training.engine.pack import Pack, pack_rows
from qlora_core.training.loop import Loop, plan_work
from qlora_core.training.plan import packed_micro_batches
from qlora_core.training.spec import TrainSpec
from tests.bench.scaling import where

BATCH_ROWS, STEPS, SETTLING_STEPS = 2048, 60, 10


class Nothing(torch.nn.Module):
    """A loss module that packs rows as the engine does and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def split(self, step: Any, lengths: Any, processes: int) -> Any:
        return packed_micro_batches(step, lengths, "auto", 16_384, processes)

    def collate(self, rows: Any) -> Pack:
        return pack_rows(rows, fill_up=False)

    def shrink(self) -> bool:
        return False

    def loss_and_grads(self, pack: Pack) -> torch.Tensor:
        return torch.ones(()) * len(pack.targets)

    def refresh(self) -> None:
        pass

    def flat_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight}

    def forward(self, pack: Pack) -> torch.Tensor:
        return torch.ones(())


def write_rows(path: Path, rows: int) -> None:
    """Random rows, a batch of which is made once and written as often as needed."""
    random = np.random.default_rng(0)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TOKEN_SCHEMA) as writer:
        for start in range(0, rows, BATCH_ROWS):
            count = min(BATCH_ROWS, rows - start)
            offsets = np.concatenate([[0], np.cumsum(random.integers(50, 151, count))]).astype(np.int32)
            ids = random.integers(0, 30_000, offsets[-1]).astype(np.int32)
            masks = (random.random(offsets[-1]) < 0.5).astype(np.uint8)
            masks[offsets[:-1]] = 0
            names = pa.array([str(number) for number in range(start, start + count)], pa.string())
            lists = [pa.ListArray.from_arrays(offsets, values) for values in (ids, masks)]
            writer.write(pa.RecordBatch.from_arrays([names, *lists], schema=TOKEN_SCHEMA))


def measure(rows: int, folder: Path) -> dict[str, Any]:
    """A run of some steps over so many rows."""
    write_rows(folder / "train.arrow", rows)
    write_token_rows(folder / "evaluation.arrow", [])
    (folder / "run").mkdir()
    spec = TrainSpec(
        recipe=TrainRecipe(max_steps=STEPS, loss_spike=None, checkpoint_every_steps=10 * STEPS),
        seed=17, base=_base(folder), dataset=_dataset(folder), into=folder / "run",
    )  # fmt: skip
    began = time.perf_counter()
    work = plan_work(spec)
    planned = time.perf_counter()
    work.rows.lengths, work.rows.trained_tokens  # noqa: B018
    counted = time.perf_counter()
    module = Nothing()
    optimizer = torch.optim.AdamW([{"params": [module.weight], "lr_scale": 1.0}])
    parallel = DataParallel(Accelerator(cpu=True), module, optimizer, 1.0, torch.float32)
    ends: list[tuple[float, float]] = []

    def report(event: Event) -> None:
        if isinstance(event, Metrics):
            ends.append((time.perf_counter(), time.process_time()))

    loop = Loop(spec, work._replace(steps=work.steps[: STEPS + 1]), module, parallel, {}, 1e12, report)
    loop._evaluates_after = lambda step: False  # type: ignore[method-assign]  # it is the steps that are timed
    loop.run(0)
    seconds, processor = np.diff(ends, axis=0)[SETTLING_STEPS:].T
    return {
        "bench": "host time of a step", "rows": rows, "step_ms": round(1e3 * statistics.median(seconds), 3),
        "step_processor_ms": round(1e3 * statistics.median(processor), 3),
        "open_and_plan_s": round(planned - began, 3), "count_s": round(counted - planned, 3),
        "steps": len(seconds), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def _base(folder: Path) -> ModelSnapshot:
    facts = Architecture(
        model_type="llama", layers=1, hidden=64, intermediate=64, heads=1, kv_heads=1, vocab=30_000,
        context_tokens=2048, parameters=1, tied_embeddings=True,
    )  # fmt: skip
    return ModelSnapshot(path=folder, source="nothing", revision="1", architecture=facts)


def _dataset(folder: Path) -> PreparedDataset:
    counts = {
        name: 1
        for name, field in PreparedDataset.model_fields.items()
        if field.is_required() and field.annotation in (int, float)
    }
    digests = {"tokenizer_digest": "", "template_digest": ""}
    return PreparedDataset.model_validate({"path": folder, **digests, **counts, "dropped": {}, "noticed": {}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 20_000, 200_000, 2_000_000])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for rows in args.rows:
        with TemporaryDirectory(prefix="qlora-rows-") as folder:
            row = measure(rows, Path(folder)) | where()
        print("RESULT", json.dumps(row), flush=True)
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
