"""What MLflow's failures mean to whoever reads the last line of a terminal."""

from urllib.parse import urlsplit, urlunsplit

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from qlora_core.errors import RegistryError, RegistryUnavailableError

PASSING = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
"""Codes of MLflow that say nothing about the request; no answer at all is INTERNAL_ERROR too."""
LONGEST_TEXT_CHARACTERS = 300


def explain(error: BaseException, mlflow_uri: str) -> RegistryError | None:
    """What a failure of MLflow means and what is safe; None if the error is something else."""
    if isinstance(error, MlflowException):
        passing = error.error_code in PASSING or isinstance(error.__cause__ or error.__context__, SQLAlchemyError)
    elif isinstance(error, SQLAlchemyError):
        passing = True
    else:
        return None
    what = " ".join(str(error).split())[:LONGEST_TEXT_CHARACTERS]
    where = without_secrets(mlflow_uri)
    if passing:
        return RegistryUnavailableError(
            f"MLflow at {where} failed: {what}. Nothing counts as promoted that its registry does not show; "
            "what was made is kept, and the same command goes on once MLflow answers"
        )
    return RegistryError(f"MLflow at {where} refused: {what}")


def without_secrets(uri: str) -> str:
    """The address without the name and password that it may hold."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
