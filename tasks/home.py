"""The home of an installation: made once, by one process, at the place that it knows.

    <home>/home.json                 where the home was last, and what its databases were brought up to date by
    <home>/locks/home.lock           held while it is made, migrated or adapted to a new place
    <home>/mlflow/, <home>/prefect/  a database each

MLflow keeps absolute addresses of artifacts. When the home is found at another place than it was, they are rewritten
in one transaction, so that it can be moved or copied like any folder.
"""

import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from qlora_core.artifacts import Record
from qlora_core.errors import StoreError
from qlora_core.store import write_atomically
from tasks.databases import BUSY_S, Stamp, bring_up_to_date, is_current, mlflow_database, prefect_database
from tasks.processes import owner_is_alive, runs_here
from tasks.settings import Settings

log = logging.getLogger(__name__)
FACTS = "home.json"
PATIENCE_S = 600
"""How long to wait for another process that makes the databases; it takes ten seconds on a free machine."""
ARTIFACTS = re.compile(r"file://(?P<home>/.*)/mlflow/artifacts/?(?P<below>.*)")
"""The address of an experiment's artifacts."""
WITHOUT_ADDRESSES = ("metrics", "latest_metrics", "alembic_version")
"""Tables of MLflow that are long and hold no addresses."""


class Facts(Record):
    """What a home knows of itself."""

    path: Path
    databases: dict[str, Stamp] = Field(default_factory=dict)


def open_home(settings: Settings, with_prefect: bool = False) -> None:
    """Make the home and its databases, or bring them up to date and to their place; quick where nothing is to do.

    Args:
        settings: where it is, and which databases are in it.
        with_prefect: whether the embedded Prefect server is about to start.

    Raises:
        StoreError: it is in use at another place, or a database is damaged.
    """
    databases = [mlflow_database(settings)] if settings.embedded_mlflow else []
    if with_prefect and settings.keeps_prefect:
        databases.append(prefect_database(settings))
    if not databases:
        return
    facts = _facts(settings)
    if facts and facts.path == settings.root and all(is_current(d, facts.databases.get(d.package)) for d in databases):
        return
    with _alone(settings):
        facts = _facts(settings) or Facts(path=_earlier_place(settings) or settings.root)
        stamps = dict(facts.databases)
        for database in databases:
            database.path.parent.mkdir(parents=True, exist_ok=True)
            if not is_current(database, stamps.get(database.package)):
                stamps[database.package] = bring_up_to_date(database)
        if facts.path != settings.root:
            _adapt(settings, facts.path)
        write_atomically(settings.root / FACTS, Facts(path=settings.root, databases=stamps).model_dump_json(indent=1))


def earlier_place(settings: Settings) -> Path | None:
    """Where the home was before it was moved or copied here; None if it has not been, or if that was adapted."""
    facts = _facts(settings)
    place = facts.path if facts else _earlier_place(settings)
    return place if place != settings.root else None


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Hold the lock of the home, made if need be."""
    locks = settings.root / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "home.lock", timeout=PATIENCE_S):
            yield
    except Timeout as error:
        raise StoreError(
            f"another process has been preparing {settings.root} for {PATIENCE_S} s; look for it with "
            f"`fuser {locks / 'home.lock'}`, end it, and try again"
        ) from error


def _facts(settings: Settings) -> Facts | None:
    try:
        return Facts.model_validate_json((settings.root / FACTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _adapt(settings: Settings, old: Path) -> None:
    """Let every address in MLflow's database that lies below the old place lie below the new one.

    Raises:
        StoreError: somebody works in this very home, at its old place.
    """
    if not settings.mlflow_database.is_file():
        return
    with closing(_connect(settings)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        _require_idle(connection, settings, old)
        before, after = f"{old.as_uri()}/", f"{settings.root.as_uri()}/"
        changed = sum(_replace(connection, table, before, after) for table in _tables(connection))
    log.warning("the home was moved from %s to %s: %s entries of MLflow now say so", old, settings.root, changed)


def _replace(connection: sqlite3.Connection, table: str, before: str, after: str) -> int:
    columns = [
        name
        for _, name, kind, _, _, _, hidden in connection.execute(f'PRAGMA table_xinfo("{table}")')
        if not hidden and re.match("(?i)varchar|text|json|clob", kind)
    ]
    changed = 0
    for column in columns:
        changed += connection.execute(
            f'UPDATE "{table}" SET "{column}" = replace("{column}", :before, :after) '
            f'WHERE instr("{column}", :before) > 0 AND instr("{column}", :after) = 0',
            {"before": before, "after": after},
        ).rowcount
    return changed


def _tables(connection: sqlite3.Connection) -> list[str]:
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return [name for (name,) in found.fetchall() if name not in WITHOUT_ADDRESSES]


def _require_idle(connection: sqlite3.Connection, settings: Settings, old: Path) -> None:
    """A folder can be at two places at once, by a mount: a run that is under way there would lose its files."""
    owners = connection.execute(
        "SELECT tags.value FROM tags JOIN runs USING (run_uuid) WHERE tags.key = 'qlora.owner' AND status = 'RUNNING'"
    )
    busy = [owner for (owner,) in owners if runs_here(owner) and owner_is_alive(owner)]
    if busy:
        pids = ", ".join(sorted({owner.split(":")[1] for owner in busy}))
        raise StoreError(
            f"{settings.root} is the home that was at {old}, and the processes {pids} work in it; wait until they have "
            f"ended, or set QLORA_HOME={old}"
        )


def _earlier_place(settings: Settings) -> Path | None:
    """Where a home of an earlier version, which did not write it down, was made: MLflow's experiments tell."""
    if not settings.mlflow_database.is_file():
        return None
    try:
        with closing(_connect(settings)) as connection:
            rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    except sqlite3.Error:
        return None
    artifacts = settings.root / "mlflow" / "artifacts"
    for (location,) in rows:
        found = ARTIFACTS.fullmatch(str(location))
        if found and (artifacts / unquote(found["below"])).is_dir():
            return Path(unquote(found["home"]))
    return None


def _connect(settings: Settings) -> sqlite3.Connection:
    uri = f"{settings.mlflow_database.as_uri()}?mode=rw"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)
