"""Entries that the tests of child processes run."""

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
