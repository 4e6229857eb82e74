"""Databases that this machine opens itself, as a server does: their schemas, and the extension that Prefect needs."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from tasks.databases import mlflow_migrations, prefect_migrations
from tasks.doctor.check import Check, failed, ok
from tasks.settings import Settings, without_secrets

PREFECT_DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
MLFLOW_DATABASE = "MLFLOW_BACKEND_STORE_URI"
EXTENSION = "pg_trgm"


def examine(settings: Settings) -> Iterator[Check]:
    """A line for each database that the environment names, or that lies in the home; none on a worker of a team."""
    mlflow = os.environ.get(MLFLOW_DATABASE) or settings.mlflow_uri
    if not mlflow.startswith("http") and _is_there(mlflow):
        yield _schema("MLflow schema", mlflow, mlflow_migrations(), "mlflow db upgrade DATABASE, after a backup")
    prefect = os.environ.get(PREFECT_DATABASE, "")
    if prefect and _is_there(prefect):
        do = "prefect server database upgrade, after a backup"
        yield _schema("Prefect schema", prefect, prefect_migrations(make_url(prefect).get_backend_name()), do)


def _schema(what: str, uri: str, migrations: ScriptDirectory, do: str) -> Check:
    where = without_secrets(uri)
    try:
        with create_engine(_readable(uri), poolclass=NullPool).connect() as connection:
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            lacks = what.startswith("Prefect") and _lacks_extension(connection)
    except SQLAlchemyError as error:
        return failed(what, f"{where}: {' '.join(str(error.__cause__ or error).split())[:200]}", do)
    if lacks:
        return failed(what, f"{where} lacks {EXTENSION}", f"CREATE EXTENSION {EXTENSION}; infra/postgres.sql does it")
    wanted = migrations.get_current_head()
    if found != wanted:
        return failed(what, f"{where} is at {found}, and what is installed here wants {wanted}", do)
    return ok(what, f"{where} is up to date")


def _lacks_extension(connection: Connection) -> bool:
    if connection.dialect.name != "postgresql":
        return False
    wanted = text("SELECT count(*) FROM pg_extension WHERE extname = :name")
    return connection.execute(wanted, {"name": EXTENSION}).scalar() == 0


def _readable(uri: str) -> str:
    """The same database by a driver that waits for its answers."""
    return uri.replace("+asyncpg", "+psycopg").replace("+aiosqlite", "")


def _is_there(uri: str) -> bool:
    """False for a file that nobody has made yet."""
    url = make_url(uri)
    if not url.drivername.startswith("sqlite"):
        return True
    file = (url.database or "").removeprefix("file:")
    return Path(unquote(file) if "uri" in url.query else file).is_file()
