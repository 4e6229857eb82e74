"""The two SQLite databases of a home: made aside and renamed, brought up to date in a copy, never half made.

Who makes them holds the lock of the home (`home.py`). A process that is killed leaves a folder that nobody reads, and
the next one starts again.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple
from urllib.parse import quote

from alembic.script import ScriptDirectory
from alembic.util import CommandError

from qlora_core.artifacts import Record
from qlora_core.errors import StoreError
from tasks.settings import Settings, sqlite_url

ASIDE = ".making-"
SIDE_FILES = ("-journal", "-wal", "-shm")
"""What SQLite keeps beside a database; it would apply them to whatever bears its name."""
BUSY_S = 60.0
LONGEST_TEXT_CHARACTERS = 500


class Stamp(Record):
    """What a database was brought up to date by."""

    version: str
    """Of the package whose database it is."""
    revision: str
    """Of its schema, as alembic counts."""


class Database(NamedTuple):
    """One database of a home."""

    package: str
    path: Path
    migrate: Callable[[Path], None]
    """Makes the database at a path, or brings it up to date."""
    migrations: Callable[[], ScriptDirectory]
    content: tuple[str, ...]
    """SQL queries, each a count of what somebody has put into it."""


def mlflow_database(settings: Settings) -> Database:
    """Runs and the registry."""
    artifacts = settings.mlflow_artifacts or ""
    return Database(
        "mlflow",
        settings.mlflow_database,
        lambda path: _migrate_mlflow(path, artifacts),
        mlflow_migrations,
        (
            "SELECT count(*) FROM runs",
            "SELECT count(*) FROM registered_models",
            "SELECT count(*) FROM experiments WHERE name <> 'Default'",
        ),
    )


def prefect_database(settings: Settings) -> Database:
    """Flow runs and deployments, of the embedded server."""
    content = ("SELECT count(*) FROM flow_run", "SELECT count(*) FROM deployment")
    return Database("prefect", settings.prefect_database, _migrate_prefect, prefect_migrations, content)


def is_current(database: Database, stamp: Stamp | None) -> bool:
    """Whether there is nothing to do, found by one look into the database."""
    if stamp is None or stamp.version != version(database.package):
        return False
    return database.path.is_file() and _revision(database.path) == stamp.revision


def bring_up_to_date(database: Database) -> Stamp:
    """Make a database that is missing or half made, or migrate one with content; the caller holds the lock.

    Raises:
        StoreError: it is damaged, of a newer version, or cannot be migrated; it was left as it is.
    """
    for left in database.path.parent.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    head = str(database.migrations().get_current_head())
    there = database.path.is_file()
    found = _revision(database.path) if there else None
    if not there or (found != head and not _has_content(database)):
        _make(database)
    elif found != head:
        _require_known(database, str(found))
        _update(database, str(found))
    return Stamp(version=version(database.package), revision=head)


def mlflow_migrations() -> ScriptDirectory:
    """The schemas that the installed MLflow knows."""
    return ScriptDirectory(str(_package("mlflow") / "store" / "db_migrations"))


def prefect_migrations(kind: str = "sqlite") -> ScriptDirectory:
    """The schemas that the installed Prefect knows, for `sqlite` or `postgresql`."""
    folder = _package("prefect") / "server" / "database" / "_migrations"
    return ScriptDirectory(str(folder), version_locations=[str(folder / "versions" / kind)])


def _make(database: Database) -> None:
    """A whole database under a temporary name, renamed; what is half made under its name goes first."""
    aside = Path(mkdtemp(prefix=ASIDE, dir=database.path.parent))
    made = aside / database.path.name
    database.migrate(made)
    _close(made)
    for old in (database.path, *(database.path.with_name(database.path.name + end) for end in SIDE_FILES)):
        old.unlink(missing_ok=True)
    made.rename(database.path)
    shutil.rmtree(aside, ignore_errors=True)


def _update(database: Database, revision: str) -> None:
    """Migrate a copy, keep another one as it was, and put the result back in one transaction of SQLite's."""
    aside = Path(mkdtemp(prefix=ASIDE, dir=database.path.parent))
    copy, before = aside / database.path.name, database.path.with_suffix(f".{revision}.db")
    with closing(_connect(database.path, "rw")) as watch:
        seen = watch.execute("PRAGMA data_version").fetchone()
        _copy(database.path, copy)
        _copy(database.path, before)
        database.migrate(copy)
        if watch.execute("PRAGMA data_version").fetchone() != seen:
            raise StoreError(
                f"another program has written to {database.path} while its schema was brought from {revision} to that "
                f"of {database.package} {version(database.package)}; end it and try again. Nothing was changed"
            )
    _copy(copy, database.path)
    shutil.rmtree(aside, ignore_errors=True)


def _require_known(database: Database, revision: str) -> None:
    try:
        database.migrations().get_revision(revision)
    except CommandError:
        raise StoreError(
            f"{database.path} has schema {revision}, which {database.package} {version(database.package)} does not "
            f"know; a newer {database.package} has written it. Install that version, or use another QLORA_HOME"
        ) from None


def _migrate_mlflow(path: Path, artifacts: str) -> None:
    """As MLflow does itself when it opens a database, with the experiment `Default` that it then makes."""
    command = (
        "import sys; from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry as engine, _upgrade_db; "
        "from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore; "
        "len(sys.argv) > 3 and _upgrade_db(engine(sys.argv[1])); SqlAlchemyStore(*sys.argv[1:3])"
    )
    known = ["known"] if path.is_file() else []
    _run(["-c", command, sqlite_url(path), artifacts, *known], path, {})


def _migrate_prefect(path: Path) -> None:
    place = {
        "PREFECT_HOME": str(path.parent),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": sqlite_url(path, "aiosqlite"),
        "PREFECT_API_DATABASE_CONNECTION_URL": sqlite_url(path, "aiosqlite"),
    }
    _run(["-m", "prefect", "server", "database", "upgrade", "--yes"], path, place)


def _run(arguments: list[str], path: Path, environment: dict[str, str]) -> None:
    """In a process of its own: it logs, imports and configures as it likes, and its death is no half-made database."""
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-LONGEST_TEXT_CHARACTERS:]
        raise StoreError(f"the database {path.name} cannot be made in {path.parent.parent}: {said}")


def _has_content(database: Database) -> bool:
    """Whether somebody has put anything into it; a table that is missing holds nothing."""
    with closing(_connect(database.path, "rw")) as connection:
        for query in database.content:
            with suppress(sqlite3.OperationalError):
                if connection.execute(query).fetchone()[0]:
                    return True
    return False


def _revision(path: Path) -> str | None:
    try:
        with closing(_connect(path, "rw")) as connection:
            found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise _unreadable(path, error) from error
    except sqlite3.DatabaseError as error:
        raise _unreadable(path, error) from error
    return str(found[0][0]) if len(found) == 1 else None


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"the database {path} cannot be read: {error}. Give this user the right to read and write it and its folder; "
        "if it is damaged, put a backup in its place, or move it away to begin with an empty one"
    )


def _copy(source: Path, target: Path) -> None:
    """By SQLite's own backup: whole whatever others do meanwhile, and seen by those who have the target open."""
    with closing(_connect(source)) as one, closing(_connect(target)) as other:
        one.backup(other)


def _close(path: Path) -> None:
    """Into one file that is on the disk."""
    with closing(_connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _connect(path: Path, mode: str = "rwc") -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=BUSY_S)


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
