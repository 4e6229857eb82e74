"""The tags that this program writes into the registry, and the one place that reads them.

People and other programs edit MLflow. A tag of ours that holds what its kind does not allow counts as absent, for every
command; that is said once, and `qlora reconcile` repairs it. A tag that is missing is no fault: somebody else may have
made the version. On versions:

    qlora.key            what the version was judged as, a fingerprint
    qlora.verdict        what was decided, one of `VERDICTS`
    qlora.reason         what the gates said; what a person says is in `qlora.<event>_why`
    qlora.<event>_by, _why, _at     who did it last, why and when
    qlora.event.<time>   everything that was ever done to it, one tag each, never written again
    qlora.*_digest, qlora.scores …  its lineage and its scores

On models: `qlora.move` and `qlora.aliases` (see `moves.py`), and `qlora.retraining`.
"""

import logging
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple
from uuid import UUID

from pydantic import Field, TypeAdapter, model_validator

from qlora_core.artifacts import Record, Scores
from qlora_core.errors import shortened

PREFIX = "qlora."
MOVE, LEFT = "qlora.move", "qlora.aliases"
KEY, VERDICT, REASON = "qlora.key", "qlora.verdict", "qlora.reason"
SCORES, OTHER_SCORES = "qlora.scores", "qlora.other_scores"
MODEL_DIGEST, DATA_DIGEST, COMPARED_WITH = "qlora.model_digest", "qlora.data_digest", "qlora.compared_with"
PARENT_RUN, COPIED_FROM = "qlora.parent_run", "qlora.copied_from"
APPROVE_BEFORE, APPROVAL_RUN = "qlora.approve_before", "qlora.approval_run"
EVENT = "qlora.event."

OPEN = "open"
PROMOTED, REJECTED, ROLLED_BACK = "promoted", "rejected", "rolled back"
AWAITING, DECLINED, EXPIRED = "awaiting approval", "declined", "expired"
VERDICTS = (PROMOTED, REJECTED, ROLLED_BACK, AWAITING, DECLINED, EXPIRED)

LARGEST_VERSION = 2**31 - 1
"""What fits into the registry's database."""
LOG = logging.getLogger("qlora")

VersionNumber = Annotated[int, Field(ge=1, le=LARGEST_VERSION)]
Aliases = dict[Annotated[str, Field(pattern="^(champion|previous)$")], VersionNumber]


class Event(Record):
    """Something that was done to a version."""

    what: str
    """`promoted`, `rolled_back`, `restored`, `declined` or `expired`."""
    by: str
    why: str
    at: str
    """ISO 8601."""

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.at} by {self.by or 'nobody knows whom'}" + (f": {self.why}" if self.why else "")


class Move(Record):
    """One change of `champion` and `previous`."""

    kind: Literal["promotion", "rollback"]
    before: Aliases
    after: Aliases
    tags: dict[VersionNumber, dict[Annotated[str, Field(pattern=r"^qlora\.[A-Za-z0-9_.:/-]{1,200}$")], str]] = Field(
        default_factory=dict
    )
    """Version number to the tags that the move leaves on it."""

    @model_validator(mode="after")
    def _ends_with_a_champion(self) -> "Move":
        if "champion" not in self.after:
            raise ValueError("a move ends with a champion")
        return self


class Kind(NamedTuple):
    """What a tag may hold."""

    name: str
    """In words, after "which is not"."""
    parse: Callable[[str], object]
    """Raises ValueError or OverflowError for anything else."""


class Reading(NamedTuple):
    """The tags of a model or version, as far as they are understood."""

    tags: dict[str, str]
    """Those that are, and those of others."""
    misread: dict[str, str]
    """Those of ours that are not: name to what they hold."""


def parse_aliases(text: str) -> Aliases:
    """The value of `qlora.aliases`."""
    return _ALIASES.validate_json(text)


def parse_move(text: str) -> Move:
    """The value of `qlora.move`."""
    return Move.model_validate_json(text)


def parse_scores(text: str) -> Scores:
    """The value of `qlora.scores`."""
    return _SCORES.validate_json(text)


def parse_other_scores(text: str) -> dict[str, Scores]:
    """The value of `qlora.other_scores`."""
    return _OTHER_SCORES.validate_json(text)


def parse_time(text: str) -> datetime:
    """A time in UTC; one without a zone is taken for UTC."""
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def parse_event(text: str) -> Event:
    """The value of a tag `qlora.event.<time>`."""
    return Event.model_validate_json(text)


def event(what: str, by: str, why: str) -> dict[str, str]:
    """The tag that keeps an event for good, whatever is decided later."""
    now = datetime.now(UTC)
    told = Event(what=what, by=by, why=why, at=now.isoformat(timespec="seconds"))
    return {f"{EVENT}{now:%Y-%m-%dT%H:%M:%S.%fZ}": told.model_dump_json()}


def read(tags: Mapping[str, str], whose: str) -> Reading:
    """Sort the tags of a model or version into those that are understood and those that are not; say once which.

    Args:
        tags: as MLflow has them.
        whose: the model or version, for people.
    """
    misread = {name: value for name, value in tags.items() if name.startswith(PREFIX) and not _fits(name, value)}
    for name, value in misread.items():
        say_once(
            f"{whose}: the tag {name} holds {shortened(value)!r}, which is not {_kind(name).name}; it counts as "
            "absent, and `qlora reconcile` repairs it"
        )
    return Reading({name: value for name, value in tags.items() if name not in misread}, misread)


@lru_cache(maxsize=4096)
def say_once(sentence: str) -> None:
    """Warn, but not again in this process."""
    LOG.warning(sentence)


def _fits(name: str, value: str) -> bool:
    try:
        _kind(name).parse(value)
    except (ValueError, OverflowError):  # pydantic's errors are ValueErrors
        return False
    return True


@lru_cache(maxsize=1024)
def _kind(name: str) -> Kind:
    if name in KINDS:
        return KINDS[name]
    return next((kind for pattern, kind in FAMILIES if re.fullmatch(pattern, name)), TEXT)


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}", text):
        raise ValueError(text)
    return text


def _verdict(text: str) -> str:
    if text not in VERDICTS:
        raise ValueError(text)
    return text


_ALIASES: TypeAdapter[Aliases] = TypeAdapter(Aliases)
_SCORES: TypeAdapter[Scores] = TypeAdapter(Scores)
_OTHER_SCORES: TypeAdapter[dict[str, Scores]] = TypeAdapter(dict[str, Scores])

TEXT = Kind("text", str)
WORD = Kind("a digest, key or id", _word)
KINDS: dict[str, Kind] = {
    MOVE: Kind("a move of aliases", parse_move),
    LEFT: Kind("the aliases that a move has left", parse_aliases),
    "qlora.retraining": WORD,
    KEY: WORD,
    VERDICT: Kind(f"one of {', '.join(VERDICTS)}", _verdict),
    SCORES: Kind("a JSON object of numbers", parse_scores),
    OTHER_SCORES: Kind("a JSON object of scores by model", parse_other_scores),
    COMPARED_WITH: WORD,
    PARENT_RUN: WORD,
    APPROVE_BEFORE: Kind("a time as ISO 8601 writes it", parse_time),
    APPROVAL_RUN: Kind("the id of a Prefect run", UUID),
}
FAMILIES: tuple[tuple[str, Kind], ...] = (
    (r"qlora\.[a-z]+_digest", WORD),
    (r"qlora\.report_key", WORD),
    (r"qlora\.export\..+", WORD),
    (r"qlora\.[a-z_]+_at", Kind("a time as ISO 8601 writes it", parse_time)),
    (r"qlora\.event\..+", Kind("an event as JSON", parse_event)),
)
"""Patterns of names, asked in this order after `KINDS`."""
