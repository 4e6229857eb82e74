"""What retraining many recipes a night needs: GPUs, hours, storage, database; worked out from what was measured.

    python tests/bench/sizing.py            the tables of docs/scaling.md, as Markdown

Reads `results/`: training speed, speed of merging, growth of the database. What was not
measured is an assumption, and each one is named below and in the page. The queue is simulated as Prefect works it
off: workers with one slot each that ask for work every few seconds, first come, first served, a limit on the pool.
"""

import heapq
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_core.artifacts import Architecture
from qlora_core.recipe import TrainRecipe
from qlora_core.training.memory import adapter_parameters, plan_memory
from tests.bench.database import ANSWERS, answers, growth

RESULTS = Path(__file__).with_name("results")
GIB, HOUR_S = 2**30, 3600

TOKENS = 1_000_000
"""Assumed: what one retraining trains on, epochs counted, as 2,000 rows of 250 tokens twice."""
EVALUATION_TOKENS = 100_000
"""Assumed: of each model that is scored."""
COPY_BYTES_A_S = 1.0e9
"""Assumed: to and from the object store of a worker, and from a disk."""
FORWARD_SHARE = 0.3
"""Of a training step: a step does about three times the arithmetic of a forward pass, in 4 bits and 16 alike."""
START_S = 25.0
"""Assumed: imports of the flow and of its child processes, and what both servers are asked and told."""
ROW_TOKENS, STEP_TOKENS = 2048, 8192
POLL_S = 10.0
"""Prefect's own: how often a worker asks for work."""
SPREAD = 0.25
"""Assumed: standard deviation of the logarithm of a duration."""
CRASHES, RECONCILE_S, CHECKPOINT_SHARE = 0.01, 600.0, 0.1
"""Assumed: how many runs lose their machine, how often `reconcile` looks (as deployed), how much is done again."""


def _shape(layers: int, hidden: int, intermediate: int, heads: int, billions: float) -> Architecture:
    return Architecture(
        model_type="qwen2",
        parameters=round(billions * 1e9),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=2 if hidden < 3000 else 4 if hidden < 5000 else 8,
        vocab=151_936,
        context_tokens=32_768,
        tied_embeddings=billions < 4,
    )


BASES = {
    "1.5B": _shape(28, 1536, 8960, 12, 1.54),
    "7B": _shape(28, 3584, 18944, 28, 7.62),
    "14B": _shape(48, 5120, 13824, 40, 14.8),
    "32B": _shape(64, 5120, 27648, 40, 32.8),
    "72B": _shape(80, 8192, 29568, 64, 72.7),
}
"""The shapes of Qwen2.5."""


class Need(NamedTuple):
    """What one retraining of a base takes."""

    training_gib: float
    tokens_per_s: float
    train_s: float
    merge_s: float
    evaluate_s: float
    copy_s: float
    rest_s: float
    model_gb: float
    adapter_mb: float

    @property
    def total_s(self) -> float:
        return self.train_s + self.merge_s + self.evaluate_s + self.copy_s + self.rest_s


def measured(file: str, **wanted: Any) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def speed_of(name: str) -> float:
    """Tokens a second of one H100: measured at 1.5B, 7B and 32B, at the arithmetic rate of the 32B for the others."""
    if name in ("1.5B", "7B"):
        rows = measured("training.jsonl", shape=name.lower(), impl="ours", seq_len=ROW_TOKENS, activation_memory="fast")
        return statistics.median(row["tokens_per_s"] for row in rows if row["micro_batch"] == 4)
    (pair,) = measured("scaling.jsonl", shape="32b", strategy="ddp", gpus=2)
    return float(pair["tokens_per_s"]) / 2 * BASES["32B"].parameters / BASES[name].parameters


def need_of(name: str) -> Need:
    """Of one retraining on one H100."""
    facts, tokens_per_s = BASES[name], speed_of(name)
    plan = plan_memory(facts, TrainRecipe(), ROW_TOKENS, STEP_TOKENS, 74.0)
    if plan.activation_memory != "fast":  # what keeping activations in host memory cost at 7B
        small = measured("training.jsonl", shape="7b", impl="ours", activation_memory="small")
        tokens_per_s *= statistics.median(row["tokens_per_s"] for row in small) / speed_of("7B")
    model_bytes = 2 * facts.parameters
    merge = max(
        row["wall_s"] / row["checkpoint_gb"]
        for row in measured("merge.jsonl", way="merge and compare every tensor", cold=True)
    )
    loads = statistics.median(row["load_s"] for row in measured("training.jsonl", shape="7b", impl="ours"))
    return Need(
        training_gib=plan.estimate.total_gib,
        tokens_per_s=tokens_per_s,
        train_s=loads * max(1.0, facts.parameters / BASES["7B"].parameters) + TOKENS / tokens_per_s,
        merge_s=merge * model_bytes / 1e9,
        evaluate_s=2 * (model_bytes / COPY_BYTES_A_S + EVALUATION_TOKENS / (tokens_per_s / FORWARD_SHARE)),
        copy_s=2 * model_bytes / COPY_BYTES_A_S,
        rest_s=START_S,
        model_gb=model_bytes / 1e9,
        adapter_mb=adapter_parameters(facts, TrainRecipe().lora.rank) * 4 / 1e6,
    )


class Night(NamedTuple):
    """How a queue was worked off."""

    end_h: float
    busy_percent: float
    wait_median_h: float
    wait_worst_h: float
    started_again: int


def night(durations_s: Sequence[float], gpus: int, over_h: float, seed: int = 0) -> Night:
    """Work off one run a recipe.

    Args:
        durations_s: of each run, before it varies.
        gpus: workers with one slot each, which is the pool's limit too.
        over_h: cron lines are spread evenly over so many hours; 0 means all at the same minute.
        seed: of durations, polls and crashes.
    """
    dice = random.Random(seed)
    due = [(over_h * HOUR_S * at / len(durations_s), at, seconds) for at, seconds in enumerate(durations_s)]
    heapq.heapify(due)
    free = [dice.uniform(0, POLL_S) for _ in range(gpus)]
    heapq.heapify(free)
    waits, busy, again, end = [], 0.0, 0, 0.0
    while due:
        at_s, number, seconds = heapq.heappop(due)
        start = max(at_s, heapq.heappop(free)) + dice.uniform(0, POLL_S)
        takes = seconds * dice.lognormvariate(-(SPREAD**2) / 2, SPREAD)
        if dice.random() < CRASHES:  # the slot is taken until somebody notices; then the rest is done elsewhere
            died = start + takes * dice.random()
            noticed = (died // RECONCILE_S + 1) * RECONCILE_S
            left = takes - (died - start) + CHECKPOINT_SHARE * takes
            heapq.heappush(due, (noticed, number, left))
            heapq.heappush(free, noticed)
            again += 1
            continue
        waits.append(start - at_s)
        busy += takes
        end = max(end, start + takes)
        heapq.heappush(free, start + takes)
    return Night(end / HOUR_S, 100 * busy / (gpus * end), statistics.median(waits) / HOUR_S, max(waits) / HOUR_S, again)


def table(head: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def needs_table(needs: dict[str, Need]) -> str:
    head = (
        "base",
        "GiB to train",
        "tokens/s",
        "train",
        "merge",
        "score two models",
        "copy",
        "start, servers",
        "in all, min",
    )
    return table(
        head,
        [
            (
                name,
                f"{need.training_gib:.0f}",
                f"{need.tokens_per_s:,.0f}",
                *(
                    f"{seconds:,.0f} s"
                    for seconds in (need.train_s, need.merge_s, need.evaluate_s, need.copy_s, need.rest_s)
                ),
                f"{need.total_s / 60:.1f}",
            )
            for name, need in needs.items()
        ],
    )


def nights_table(needs: dict[str, Need]) -> str:
    """1,000 recipes of one base, all with new data, in a night of eight hours."""
    rows = []
    for name, need in needs.items():
        durations = [need.total_s] * 1000
        fewest = next(gpus for gpus in range(1, 2000) if night(durations, gpus, 4).end_h <= 8)
        for over_h in (0, 4):
            found = night(durations, fewest, over_h)
            when = "all at 02:00" if over_h == 0 else f"spread over {over_h} h"
            rows.append(
                (
                    name,
                    fewest,
                    when,
                    f"{found.end_h:.1f}",
                    f"{found.busy_percent:.0f} %",
                    f"{found.wait_median_h:.1f}",
                    f"{found.wait_worst_h:.1f}",
                    found.started_again,
                )
            )
    head = ("base", "GPUs", "cron lines", "done after, h", "GPUs busy", "waited, median h", "longest", "started again")
    return table(head, rows)


def limits_table(need: Need) -> str:
    """How the same night goes with fewer and more slots."""
    durations = [need.total_s] * 1000
    rows = []
    for slots in (4, 8, 16, 32, 64):
        found = night(durations, slots, 0)
        rows.append(
            (
                slots,
                f"{found.end_h:.1f}",
                f"{found.busy_percent:.0f} %",
                f"{found.wait_median_h:.1f}",
                found.started_again,
            )
        )
    return table(("slots", "done after, h", "busy", "waited, median h", "started again"), rows)


def storage_table(needs: dict[str, Need]) -> str:
    rows = [
        (
            name,
            f"{need.model_gb:,.0f}",
            f"{need.adapter_mb:,.0f}",
            f"{need.model_gb:,.1f}",
            f"{3 * need.model_gb:,.1f}",
            f"{need.adapter_mb * 365 / 1e3:,.1f}",
        )
        for name, need in needs.items()
    ]
    head = (
        "base",
        "model, GB",
        "adapter, MB",
        "TB a night, 1,000 recipes",
        "TB kept: 3 versions each",
        "TB of adapters a year",
    )
    return table(head, rows)


def main() -> None:
    needs = {name: need_of(name) for name in BASES}
    print("### One retraining on one H100\n\n" + needs_table(needs))
    print("\n### 1,000 recipes in eight hours\n\n" + nights_table(needs))
    print("\n### 1,000 recipes of 7B, by slots, all due at once\n\n" + limits_table(needs["7B"]))
    print("\n### Storage\n\n" + storage_table(needs))
    if (RESULTS / "registry_scale.jsonl").exists():
        one, full = measured("registry_scale.jsonl")[-2:]
        print("\n### Database\n\n" + growth(one, full, TOKENS / STEP_TOKENS))
        print("\n" + table(ANSWERS, answers(one, full)))


if __name__ == "__main__":
    main()
