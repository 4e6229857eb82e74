"""What a running stage tells whoever started it: metrics, progress and notes.

A stage takes a `report` function and calls it with one of the events below. In a child process the events become
JSON lines in a file that the parent follows (see `process.py`), so the same stage code runs in either place.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from qlora_core.artifacts import Record


class Metrics(Record):
    """Values of one step; `step` counts optimizer steps from 1."""

    event: Literal["metrics"] = "metrics"
    step: int
    values: dict[str, float]


class Progress(Record):
    """How far a long piece of work is; `total` is 0 while unknown."""

    event: Literal["progress"] = "progress"
    what: str
    done: int
    total: int
    unit: str = ""


class Note(Record):
    """One sentence for the log."""

    event: Literal["note"] = "note"
    message: str


Event = Annotated[Metrics | Progress | Note, Field(discriminator="event")]
Report = Callable[[Metrics | Progress | Note], None]

EVENT: TypeAdapter[Metrics | Progress | Note] = TypeAdapter(Event)


def ignore(event: Metrics | Progress | Note) -> None:
    """A `Report` for callers that do not want to hear anything."""
