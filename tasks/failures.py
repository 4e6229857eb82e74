"""What failures of MLflow and Prefect mean to whoever reads the last line of a terminal."""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

import httpx
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from qlora_core.errors import QloraError, RegistryError, RegistryUnavailableError, StoreError
from tasks.settings import without_secrets

PASSING = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
"""Codes of MLflow that say nothing about the request; no answer at all is INTERNAL_ERROR too."""
WHO = {
    "UNAUTHENTICATED": "does not know this user: the password is wrong, or the token has expired. Look at "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "PERMISSION_DENIED": "does not let this user do that; who manages the model or experiment can give the right EDIT",
}
READ_ONLY = re.compile(r"read-?only (database|transaction)")
"""What SQLite and PostgreSQL say; a server passes it on as if the request were at fault."""
NOT_OURS = re.compile(r"readonly database|unable to open database file")
"""What SQLite says of a file or folder that this user may not write."""
BUSY = re.compile(r"QueuePool limit")
"""What SQLAlchemy says in a server all of whose connections are in use; passed on as a bad request, too."""
UNREACHED = "Failed to reach API at"
NOT_STARTED = "ephemeral Prefect API server"
"""Words of Prefect's client about a server that is away, and about one that it has started itself."""
LONGEST_TEXT_CHARACTERS = 300
RIGHT = "Give it the right to, or use another place (QLORA_HOME, QLORA_DOWNLOADS, HF_HOME, TMPDIR)"
MACHINE = {
    errno.ENOSPC: ("the disk is full", "Free some space, or move everything with QLORA_HOME"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, or move everything with QLORA_HOME"),
    errno.EROFS: ("the disk may only be read", "Mount it for writing, or move everything with QLORA_HOME"),
    errno.EIO: ("the disk fails", "Look at the kernel's log"),
    errno.ENOMEM: ("there is no memory left", "Free some"),
    errno.EACCES: ("this user may not read or write here", RIGHT),
    errno.EPERM: ("this user may not do that here", RIGHT),
    errno.EMFILE: ("too many files are open", "Raise the limit (ulimit -n)"),
}
"""Error number to what it means and what to do."""


def explain(error: BaseException, mlflow_uri: str) -> RegistryError | None:
    """What a failure of MLflow means and what is safe; None if the error is something else."""
    if isinstance(error, MlflowException):
        passing = (
            error.error_code in PASSING
            or isinstance(error.__cause__ or error.__context__, SQLAlchemyError)
            or READ_ONLY.search(str(error)) is not None
            or BUSY.search(str(error)) is not None
        )
    elif isinstance(error, SQLAlchemyError):
        passing = True
    else:
        return None
    code, where = getattr(error, "error_code", ""), without_secrets(mlflow_uri)
    if code in WHO:
        return RegistryError(f"MLflow at {where} {WHO[code]}. Nothing was changed by this request")
    if mlflow_uri.startswith("sqlite") and NOT_OURS.search(str(error)):
        return RegistryError(
            f"the database of MLflow ({mlflow_uri}) may not be written by this user ({os.geteuid()}). {RIGHT}"
        )
    what = scrubbed(" ".join(str(error).split()))[:LONGEST_TEXT_CHARACTERS]
    if passing:
        return RegistryUnavailableError(
            f"MLflow at {where} failed: {what}. Nothing counts as promoted that its registry does not show; "
            "what was made is kept, and the same command goes on once MLflow answers"
        )
    return RegistryError(f"MLflow at {where} refused: {what}")


def explain_machine(error: BaseException) -> StoreError | None:
    """What it means that the machine has no more of something; None if the error is something else."""
    if isinstance(error, MemoryError):
        what, remedy = "there is no memory left", "Free some"
    elif isinstance(error, OSError) and error.errno in MACHINE:
        what, remedy = MACHINE[error.errno]
        what += f" ({error.filename}{_owner_of(error)})" if error.filename else ""
    else:
        return None
    return StoreError(f"{what}. {remedy}; what was stored so far is whole, and the same command goes on from there")


def _owner_of(error: OSError) -> str:
    """Whose the place is, where that is what matters; a folder that is missing tells by the one above it."""
    if error.errno not in (errno.EACCES, errno.EPERM) or not isinstance(error.filename, str | bytes):
        return ""
    place = Path(os.fsdecode(error.filename))
    for path in (place, *place.parents):
        with suppress(OSError):
            return f", which belongs to user {path.stat().st_uid}; this is user {os.geteuid()}"
    return f"; this is user {os.geteuid()}"


def explain_prefect(error: BaseException) -> QloraError | None:
    """What a failure of the Prefect server means; None if the error is something else.

    Its client raises what httpx raises, so that Prefect, which takes seconds, need not be imported to know.
    """
    where = without_secrets(os.environ.get("PREFECT_API_URL", ""))
    if not where:
        return _explain_embedded_prefect(error)
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
        return QloraError(
            f"Prefect at {where} does not let us in ({error.response.status_code}): look at PREFECT_API_AUTH_STRING "
            "or PREFECT_API_KEY. Nothing was changed"
        )
    if isinstance(error, httpx.HTTPStatusError) and error.response.is_server_error:
        return QloraError(
            f"Prefect at {where} failed ({error.response.status_code}); is its database up? What was made is kept, and "
            "the same command goes on once Prefect answers"
        )
    if isinstance(error, httpx.TransportError) or _says(error, UNREACHED):
        return QloraError(
            f"Prefect at {where} does not answer ({_kind_of(error)}); is the server up? Start it, or correct "
            "PREFECT_API_URL; `qlora doctor` looks at it. What was made is kept, and the same command goes on once "
            "Prefect answers"
        )
    return None


def _explain_embedded_prefect(error: BaseException) -> QloraError | None:
    """The same for the server that a flow brings along."""
    lost = isinstance(error, httpx.TransportError) and _asked(error).startswith("http://127.0.0.1:")
    if not lost and not _says(error, NOT_STARTED):
        return None
    what = "stopped answering" if lost else "did not start"
    said = scrubbed(" ".join(str(error).split()))[:LONGEST_TEXT_CHARACTERS]
    return QloraError(
        f"the embedded Prefect server {what} ({_kind_of(error)}: {said}). What was made is kept, and the same command "
        "goes on from there; on a slow machine PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS gives it more time"
    )


def _says(error: BaseException, sentence: str) -> bool:
    """Whether it is the error that Prefect raises with these words; its type is a plain RuntimeError."""
    return isinstance(error, RuntimeError) and sentence in str(error)


def _kind_of(error: BaseException) -> str:
    """The type of what httpx has met, where Prefect's client has wrapped it."""
    cause = error.__cause__ or error.__context__
    return type(cause if isinstance(error, RuntimeError) and cause is not None else error).__name__


def _asked(error: httpx.TransportError) -> str:
    try:
        return str(error.request.url)
    except RuntimeError:  # raised without a request
        return ""


def scrubbed(text: str) -> str:
    """A text of somebody else's without names and passwords in the addresses that it quotes."""
    return re.sub(r"(?<=://)[^/\s@'\"]+@", "", text)
