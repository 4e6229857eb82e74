"""One writer at a time for the aliases of a registered model, on one machine or in a team.

MLflow sets an alias for whoever comes last. What makes a promotion a compare-and-swap is that everybody who moves an
alias holds this lock while looking and while writing.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from hashlib import sha256
from typing import TypeVar
from urllib.parse import quote

import httpx
from filelock import FileLock, Timeout

from qlora_core.errors import RegistryUnavailableError
from tasks.settings import Settings, without_secrets
from tasks.tags import say_once

PATIENCE_S = 120
"""How long to wait for others; moving aliases takes well under a second."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
"""Before a Prefect server that has too much to do is asked again."""
SHORTEST_PATIENCE_S = 1.0
PUT_OFF = {429, 502, 503, 504}
"""Answers of a server, or of the proxy before it, that has too much to do."""
LONGEST_FILE_NAME = 200
LEASE_S = 60
"""How long a holder that was killed keeps a Prefect slot: the shortest that there is, and less than others wait."""

NO_COMMON_LOCK = (
    "{} may be shared, but PREFECT_API_URL is not set: only processes of this home keep each other from moving aliases "
    "at the same time. Set PREFECT_API_URL to the team's Prefect server wherever several machines promote"
)

T = TypeVar("T")


@contextmanager
def registry_lock(settings: Settings, name: str) -> Iterator[None]:
    """Hold the lock of a registered model, wherever the registry is:

    - a PostgreSQL database that is opened directly: an advisory lock in it, freed when its connection is gone;
    - an MLflow server, and a Prefect server beside it: a Prefect concurrency limit, whose lease ends with its holder;
    - everything else: a file in the home, which excludes the processes of this machine. Where the registry is a
      server, others may be on other machines: that is said once.

    Raises:
        RegistryUnavailableError: others held it all the time.
    """
    if settings.mlflow_uri.startswith("postgresql"):
        lock = _advisory(settings.mlflow_uri, name)
    elif settings.mlflow_uri.startswith("http") and not settings.embedded_prefect:
        lock = _concurrency_limit(name)
    else:
        if settings.mlflow_uri.startswith("http"):
            say_once(NO_COMMON_LOCK.format(without_secrets(settings.mlflow_uri)))
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
    limit, deadline = f"qlora-registry-{name}", time.monotonic() + PATIENCE_S
    _patiently(name, deadline, lambda: _make_limit(limit))
    slot = _patiently(name, deadline, lambda: _take_slot(limit, deadline))
    try:
        yield
    finally:
        # What was done under the lock stands, also where the slot cannot be given back: it ends with its lease.
        with suppress(httpx.HTTPError):
            slot.__exit__(None, None, None)


def _make_limit(limit: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists

    # Prefect looks first and makes it then: whoever made it in between has made the same.
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(limit, 1)


def _take_slot(limit: str, deadline: float) -> AbstractContextManager[None]:
    """A slot that is held; `deadline` as `time.monotonic` counts."""
    from prefect.concurrency.sync import concurrency

    patience_s = max(deadline - time.monotonic(), SHORTEST_PATIENCE_S)
    slot = concurrency(limit, timeout_seconds=patience_s, lease_duration=LEASE_S, strict=True)
    slot.__enter__()
    return slot


def _patiently(name: str, deadline: float, action: Callable[[], T]) -> T:
    """Ask a Prefect server again, ever more rarely, while it says that it has too much to do.

    Raises:
        RegistryUnavailableError: it said so until `deadline`, or others held the lock all the time.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return action()
        except TimeoutError as error:
            raise _busy(name) from error
        except Exception as error:
            if not _has_too_much_to_do(error):
                raise
            if time.monotonic() + pause_s > deadline:
                raise RegistryUnavailableError(
                    f"Prefect had too much to do for {PATIENCE_S} s to lock the aliases of {name} ({error}); "
                    "nothing was changed, try again"
                ) from error
        time.sleep(pause_s * random.uniform(0.5, 1.5))  # not all that were sent away come back together
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _has_too_much_to_do(error: BaseException) -> bool:
    """Whether a server has put us off; Prefect's client wraps some answers in errors of its own."""
    answer = error if isinstance(error, httpx.HTTPError) else error.__cause__
    if isinstance(answer, httpx.HTTPStatusError):
        return answer.response.status_code in PUT_OFF
    return isinstance(answer, httpx.TimeoutException)


def _busy(name: str) -> RegistryUnavailableError:
    return RegistryUnavailableError(
        f"others have been changing the aliases of {name} for {PATIENCE_S} s; nothing was changed, try again"
    )
