"""When a stage is in flight: what is watched for, and how the flow is held still while something is done to it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from tests.commands import Flow
from tests.integration.faults.world import COMMAND_TIMEOUT_S, Home

REQUESTS = {
    "download": ("hub", rb"GET /acme/tiny/resolve/\w+/model.safetensors"),
    "prepare": ("mlflow", rb'"key":\s*"seq_len_tokens"'),
    "register": ("mlflow", rb"POST /api/2.0/mlflow/model-versions/create"),
    "promote": ("mlflow", rb'"alias":\s*"champion"'),
}
"""Stages that are known by what they ask a server: the gate, and what it stops at."""
FILES = {
    "download": "work/download-*/scratch/child/events.jsonl",
    "train": "work/train-*/checkpoints/step-*6",
    "merge": "work/merge-*/child/events.jsonl",
    "evaluate": "work/scores-*/child/events.jsonl",
}
"""Stages that are known by what they have written."""


@contextmanager
def start_and_hold(home: Home, stage: str, in_child: bool = False) -> Iterator[Flow]:
    """A first attempt that stands still in the midst of a stage, or of its child, until the block ends."""
    if stage in REQUESTS and not (in_child and stage in FILES):
        name, pattern = REQUESTS[stage]
        with getattr(home.world, name).stop_at(pattern) as wire:
            flow = home.start(1)
            _wait(flow, wire.hit.is_set)
            yield flow
        return
    flow = home.start(1)
    _wait(flow, lambda: any(home.store.glob(FILES[stage])))
    children = flow.children()
    for child in children:
        child.suspend()
    try:
        yield flow
    finally:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.resume()


def _wait(flow: Flow, is_there: "object") -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not is_there():  # type: ignore[operator]
        assert not flow.has_ended(), f"it ended before its stage was seen:\n{flow.said()}"
        assert time.monotonic() < deadline, f"its stage never came:\n{flow.said()}"
        time.sleep(0.003)
