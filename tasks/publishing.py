"""Events that tell Prefect what has happened to a recipe's data or champion; deployments are triggered by them.

Any program may emit the same: an event named as below whose resource is `qlora.recipe.NAME`.
"""

import re
from datetime import UTC, datetime
from hashlib import sha256
from uuid import uuid4

from prefect.client.orchestration import get_client
from prefect.logging import get_logger
from prefect.variables import Variable

from qlora_core.data.prepare import inspect
from qlora_core.errors import QloraError
from qlora_core.recipe import LocalSource, Recipe
from tasks.keys import data_key
from tasks.registry import Version
from tasks.settings import Settings
from tasks.sources import resolve_data

PUBLISHED = "qlora.data.published"
DRIFTED = "qlora.champion.drifted"
VERDICT = "qlora.candidate"
"""How the events about a judged candidate begin: `qlora.candidate.promoted`, `.rejected`, `.awaiting-approval`."""


def resource(name: str) -> str:
    """The resource of every event about a recipe."""
    return f"qlora.recipe.{name}"


def emit(event: str, recipe: str, facts: dict[str, object]) -> None:
    """Emit an event about a recipe, and know when this returns that the server has it.

    Prefect's own `emit_event` hands it to a thread that is not waited for and says nothing when it fails.

    Raises:
        PrefectHTTPStatusError: the server did not take it.
    """
    body = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource(recipe), "prefect.resource.name": recipe},
        "payload": facts,
    }
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[body])


def announce(version: Version, verdict: str, reason: str) -> None:
    """Emit what was decided about a version; who listens must not change how a retraining ends.

    Args:
        version: what was judged.
        verdict: `promoted`, `rejected` or `awaiting approval`.
        reason: why, in a sentence.
    """
    facts = {"version": version.number, "verdict": verdict, "reason": reason}
    try:
        emit(
            f"{VERDICT}.{verdict.replace(' ', '-')}",
            version.name,
            {**facts, "report": version.tags.get("qlora.report", "")},
        )
    except Exception as error:
        get_logger(__name__).warning("nobody was told that %s: %s", facts, error)


def publish(recipe: Recipe, settings: Settings) -> str:
    """Say that the recipe's data may have changed, after a look at it; returns what identifies it now.

    Raises:
        QloraError: there is no server to tell, or the data cannot be read; nothing was said then.
    """
    if settings.embedded_prefect:
        raise QloraError("PREFECT_API_URL is not set, so that nobody would hear of it; `qlora run` retrains here")
    for source in (*recipe.data.rows, *recipe.data.evaluation_rows):
        if isinstance(source, LocalSource) and source.path.is_file():
            inspect(source.path)
    revision = data_key(*resolve_data(recipe, settings))
    emit(PUBLISHED, recipe.name, {"revision": revision})
    Variable.set(_seen(recipe.name), revision, overwrite=True)
    return revision


def publish_if_changed(recipe: Recipe, settings: Settings) -> str | None:
    """Publish unless this very data was published last time; returns what identifies it if it was."""
    revision = data_key(*resolve_data(recipe, settings))
    return None if Variable.get(_seen(recipe.name)) == revision else publish(recipe, settings)


def _seen(name: str) -> str:
    """The Prefect variable that remembers what was published last; its name may hold few characters."""
    return f"qlora_published_{re.sub('[^a-z0-9]', '_', name.lower())}_{sha256(name.encode()).hexdigest()[:6]}"
