"""Registered models and their versions, as records."""

from collections.abc import Mapping
from datetime import datetime

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from pydantic import Field

from qlora_core.artifacts import Record, Scores
from tasks import tags as known_tags


class Version(Record):
    """One version of a registered model, with the aliases that point at it."""

    name: str
    number: int
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    created_ms: int
    misread: dict[str, str] = Field(default_factory=dict)
    """Tags of ours that hold what they must not, which counts as absent."""

    @property
    def verdict(self) -> str:
        """What was decided about it; `open` if nothing was."""
        return self.tags.get(known_tags.VERDICT, known_tags.OPEN)

    @property
    def model_digest(self) -> str | None:
        """Of its files; None if this program has not looked at them."""
        return self.tags.get(known_tags.MODEL_DIGEST)

    @property
    def identity(self) -> str:
        """What tells this model from others: its digest, or its number where nobody knows the digest."""
        return self.model_digest or f"version-{self.number}"

    @property
    def gate_summary(self) -> str:
        """What the gates said of it; empty if they were not asked."""
        reason = self.tags.get(known_tags.REASON, "")
        # Earlier releases wrote what a person said into the same tag.
        return "" if reason in (self._comment("rolled_back"), self._comment("declined")) else reason

    @property
    def why(self) -> str:
        """Why its verdict is what it is: what the gates said, or a person where that person stopped it afterwards."""
        comment = self._comment(self.verdict.replace(" ", "_"))
        return self.gate_summary or comment if self.verdict == known_tags.PROMOTED else comment or self.gate_summary

    @property
    def scores(self) -> Scores:
        """Metric name to value, as evaluated before it was registered."""
        return known_tags.parse_scores(self.tags.get(known_tags.SCORES, "{}"))

    @property
    def other_scores(self) -> dict[str, Scores]:
        """What `base` and `champion` scored on the same rows when this version was judged."""
        return known_tags.parse_other_scores(self.tags.get(known_tags.OTHER_SCORES, "{}"))

    @property
    def approve_before(self) -> datetime | None:
        """Until when it waits for approval; None if nobody has set a limit."""
        text = self.tags.get(known_tags.APPROVE_BEFORE)
        return None if text is None else known_tags.parse_time(text)

    def _comment(self, event: str) -> str:
        return self.tags.get(f"qlora.{event}_why", "")


class Model(Record):
    """A registered model: its tags, and the versions that its aliases point at."""

    name: str
    aliases: dict[str, int]
    tags: dict[str, str]
    misread: dict[str, str] = Field(default_factory=dict)
    """Tags of ours that hold what they must not, which counts as absent."""


def model_of(model: RegisteredModel) -> Model:
    """The record of a model, its tags read."""
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    reading = known_tags.read(dict(model.tags), model.name)
    return Model(name=model.name, aliases=aliases, tags=reading.tags, misread=reading.misread)


def version_of(version: ModelVersion, aliases: Mapping[str, int]) -> Version:
    """The record of a version, its tags read; `aliases` are those of its model."""
    number = int(version.version)
    reading = known_tags.read(dict(version.tags), f"{version.name} version {number}")
    return Version(
        name=version.name,
        number=number,
        run_id=version.run_id or "",
        aliases=tuple(sorted(alias for alias, at in aliases.items() if at == number)),
        tags=reading.tags,
        misread=reading.misread,
        created_ms=version.creation_timestamp,
    )


def named(name: str) -> str:
    """The filter that finds a model by its name; MLflow knows no way to quote a quote.

    Of a name with both kinds of quotes it finds a few others too: the caller compares.
    """
    for quotation_mark in "'\"":
        if quotation_mark not in name:
            return f"name = {quotation_mark}{name}{quotation_mark}"
    return "name LIKE '{}'".format(name.replace("'", "_"))
