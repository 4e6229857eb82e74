"""Entries that the tests of child processes run."""

import atexit
import os
import signal
import sys
import time
from typing import Any

from qlora_core.artifacts import Record
from qlora_core.errors import TrainingError
from qlora_core.events import Metrics, Note, Progress, Report


class Answer(Record):
    value: int


def double(spec: dict[str, Any], report: Report) -> Answer:
    report(Note(message="here"))
    for step in (1, 2, 3):
        report(Metrics(step=step, values={"loss": 1 / step}))
        report(Progress(what="work", done=step, total=3))
    sys.stdout.write("noise on standard output\n")
    return Answer(value=spec["value"] * 2)


def fail(spec: dict[str, Any], report: Report) -> Answer:
    raise TrainingError("the rank is wrong")


def crash(spec: dict[str, Any], report: Report) -> Answer:
    raise ZeroDivisionError("never mind")


def die(spec: dict[str, Any], report: Report) -> Answer:
    os.kill(os.getpid(), signal.SIGKILL)
    return Answer(value=0)


def linger(spec: dict[str, Any], report: Report) -> Answer:
    report(Note(message=str(os.getpid())))
    time.sleep(60)
    return Answer(value=0)


def rank(spec: dict[str, Any], report: Report) -> Answer:
    report(Note(message=f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"))
    return Answer(value=int(os.environ["WORLD_SIZE"]))


def one_rank_fails(spec: dict[str, Any], report: Report) -> Answer:
    """Rank `value` fails in words while the other one waits for it in a collective."""
    return _together(spec, TrainingError("loss is nan at step 7"))


def one_rank_crashes(spec: dict[str, Any], report: Report) -> Answer:
    return _together(spec, ZeroDivisionError("rows / 0"))


def one_rank_fails_late(spec: dict[str, Any], report: Report) -> Answer:
    """After the other one has ended well and left its result."""
    if int(os.environ["RANK"]) == spec["value"]:
        time.sleep(1)
        raise TrainingError("cannot write the last file")
    return Answer(value=0)


def one_rank_dies(spec: dict[str, Any], report: Report) -> Answer:
    return _together(spec, None)


def _together(spec: dict[str, Any], error: Exception | None) -> Answer:
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    distributed.barrier()
    if distributed.get_rank() == spec["value"]:
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise error
    distributed.all_reduce(torch.ones(1))
    return Answer(value=0)


def ends_badly(spec: dict[str, Any], report: Report) -> Answer:
    """As libraries do that crash while the interpreter ends."""
    atexit.register(os._exit, 5)
    return Answer(value=spec["value"])
