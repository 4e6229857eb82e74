"""The metrics of every step, kept beside the checkpoints and then with the adapter."""

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_core.events import Metrics
from qlora_core.store import write_atomically

HISTORY = "history.jsonl"


def read_history(folder: Path, until_step: int) -> list[Metrics]:
    """What earlier attempts reported up to the step that training resumes after."""
    path = folder / HISTORY
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Metrics(step=line.pop("step"), values=line) for line in lines if line["step"] <= until_step]


def is_complete(folder: Path, step: int) -> bool:
    """Whether every step up to this one is there and can be read."""
    try:
        return [metrics.step for metrics in read_history(folder, step)] == list(range(1, step + 1))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def write_history(folder: Path, history: Sequence[Metrics]) -> None:
    """One JSON line a step."""
    write_atomically(folder / HISTORY, "".join(json.dumps({"step": m.step, **m.values}) + "\n" for m in history))
