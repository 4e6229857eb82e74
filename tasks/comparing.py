"""What two versions have not in common, and where one comes from."""

import json
from datetime import UTC, datetime

from mlflow.exceptions import MlflowException
from pydantic import Field

from qlora_core.artifacts import Record
from tasks.paging import having, search_runs
from tasks.registry import ModelRegistry, Version
from tasks.tags import EVENT, Event, parse_event
from tasks.tracking import flatten

MADE_FROM = {
    "base model": "qlora.base",
    "base digest": "qlora.base_digest",
    "data digest": "qlora.data_digest",
    "adapter digest": "qlora.adapter_digest",
    "model digest": "qlora.model_digest",
    "compared with": "qlora.compared_with",
    "report": "qlora.report",
    "copied from": "qlora.copied_from",
}
EVENTS = ("promoted", "rolled_back", "restored", "declined", "expired")


class VersionDifference(Record):
    """Two versions side by side."""

    left: Version
    right: Version
    same_rows: bool
    """Whether both were scored on the same rows; only then do their scores compare."""
    scores: dict[str, tuple[float | None, float | None]]
    recipe: dict[str, tuple[str | None, str | None]]
    """Dotted keys of the recipe whose values differ."""


class Lineage(Record):
    """Where a version comes from."""

    version: Version
    made_from: dict[str, str]
    runs: dict[str, str] = Field(default_factory=dict)
    """Stage to the MLflow run that made its output."""
    events: dict[str, str] = Field(default_factory=dict)
    """What was done last of each kind."""
    history: tuple[Event, ...] = ()
    """Everything that was done, the first thing first."""


def compare(registry: ModelRegistry, left: Version, right: Version) -> VersionDifference:
    """Scores of both, and the keys of their recipes that differ."""
    names = [*left.scores, *(name for name in right.scores if name not in left.scores)]
    first, second = _recipe(registry, left), _recipe(registry, right)
    keys = [*first, *(key for key in second if key not in first)]
    return VersionDifference(
        left=left,
        right=right,
        same_rows=left.tags.get("qlora.data_digest") == right.tags.get("qlora.data_digest"),
        scores={name: (left.scores.get(name), right.scores.get(name)) for name in names},
        recipe={key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)},
    )


def trace(registry: ModelRegistry, version: Version) -> Lineage:
    """Digests of all that a version was made from, the runs that made it, and who did what to it."""
    made_from = {what: version.tags[tag] for what, tag in MADE_FROM.items() if tag in version.tags}
    return Lineage(
        version=version,
        made_from=made_from,
        runs=_runs(registry, version),
        events=_events(version),
        history=_history(version),
    )


def _recipe(registry: ModelRegistry, version: Version) -> dict[str, str]:
    """The recipe as dotted keys; empty when its run is gone."""
    import mlflow

    try:
        uri = f"runs:/{version.tags.get('qlora.parent_run', '')}/recipe.json"
        mlflow.set_tracking_uri(registry.settings.mlflow_uri)
        return flatten(json.loads(mlflow.artifacts.load_text(uri)))
    except (MlflowException, OSError):
        return {}


def _runs(registry: ModelRegistry, version: Version) -> dict[str, str]:
    try:
        parent = registry.client.get_run(version.tags.get("qlora.parent_run", "none"))
    except MlflowException:
        return {}
    wanted = having({"mlflow.parentRunId": parent.info.run_id})
    nested = search_runs(registry.client, [parent.info.experiment_id], wanted, order="ASC")
    reused = {
        tag.removeprefix("qlora.reused."): f"{run_id} (reused)"
        for tag, run_id in parent.data.tags.items()
        if tag.startswith("qlora.reused.")
    }
    own = {run.data.tags["qlora.stage"]: run.info.run_id for run in nested if "qlora.stage" in run.data.tags}
    return {"retraining": parent.info.run_id, **reused, **own}


def _events(version: Version) -> dict[str, str]:
    made = datetime.fromtimestamp(version.created_ms / 1000, UTC).isoformat(timespec="seconds")
    events = {"registered": made}
    for what in EVENTS:
        if done := _last(version, what):
            events[what.replace("_", " ")] = done.sentence
    if before := version.tags.get("qlora.approve_before"):
        events["to be approved before"] = before
    return events


def _last(version: Version, what: str) -> Event | None:
    """The last event of a kind."""
    at, by, why = (version.tags.get(f"qlora.{what}_{part}", "") for part in ("at", "by", "why"))
    return Event(what=what, by=by, why=why, at=at) if at else None


def _history(version: Version) -> tuple[Event, ...]:
    """Every event; what an earlier release has not kept for good counts once, as the last of its kind."""
    kept = [parse_event(text) for tag, text in sorted(version.tags.items()) if tag.startswith(EVENT)]
    last = [event for what in EVENTS if (event := _last(version, what)) and event not in kept]
    return tuple(sorted([*last, *kept], key=lambda event: event.at))
