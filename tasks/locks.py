"""One writer at a time for the aliases of a registered model, on one machine or in a team.

MLflow sets an alias for whoever comes last. What makes a promotion a compare-and-swap is that everybody who moves an
alias holds this lock while looking and while writing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from urllib.parse import quote

from filelock import FileLock, Timeout

from qlora_core.errors import RegistryUnavailableError
from tasks.settings import Settings

PATIENCE_S = 120
"""How long to wait for others; moving aliases takes well under a second."""
LONGEST_FILE_NAME = 200
LEASE_S = 60
"""How long a holder that was killed keeps a Prefect slot: the shortest that there is, and less than others wait."""


@contextmanager
def registry_lock(settings: Settings, name: str) -> Iterator[None]:
    """Hold the lock of a registered model, wherever the registry is:

    - a PostgreSQL database that is opened directly: an advisory lock in it, freed when its connection is gone;
    - an MLflow server, and a Prefect server beside it: a Prefect concurrency limit, whose lease ends with its holder;
    - everything else: a file in the home, which excludes the processes of this machine.

    Raises:
        RegistryUnavailableError: others held it all the time.
    """
    if settings.mlflow_uri.startswith("postgresql"):
        lock = _advisory(settings.mlflow_uri, name)
    elif settings.mlflow_uri.startswith("http") and not settings.embedded_prefect:
        lock = _concurrency_limit(name)
    else:
        lock = _file(settings, name)
    with lock:
        yield


@contextmanager
def _file(settings: Settings, name: str) -> Iterator[None]:
    locks = settings.root / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(locks / f"registry-{_file_name(name)}.lock", timeout=PATIENCE_S):
            yield
    except Timeout as error:
        raise _busy(name) from error


def _file_name(name: str) -> str:
    """A name as one part of a path: equal for equal names, and short."""
    quoted = quote(name, safe="")
    return quoted if len(quoted) <= LONGEST_FILE_NAME else sha256(name.encode()).hexdigest()


@contextmanager
def _advisory(uri: str, name: str) -> Iterator[None]:
    from sqlalchemy import NullPool, create_engine, text
    from sqlalchemy.exc import OperationalError

    engine = create_engine(uri, poolclass=NullPool)
    with engine.connect() as connection:
        try:
            connection.execute(text(f"SET lock_timeout = '{PATIENCE_S}s'"))
            connection.execute(text("SELECT pg_advisory_lock(hashtextextended(:key, 0))"), {"key": f"qlora {name}"})
        except OperationalError as error:
            raise _busy(name) from error
        yield


@contextmanager
def _concurrency_limit(name: str) -> Iterator[None]:
    from prefect.client.orchestration import get_client
    from prefect.concurrency.sync import concurrency

    limit = f"qlora-registry-{name}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(limit, 1)
    try:
        slot = concurrency(limit, timeout_seconds=PATIENCE_S, lease_duration=LEASE_S, strict=True)
        with slot:
            yield
    except TimeoutError as error:
        raise _busy(name) from error


def _busy(name: str) -> RegistryUnavailableError:
    return RegistryUnavailableError(
        f"others have been changing the aliases of {name} for {PATIENCE_S} s; nothing was changed, try again"
    )
