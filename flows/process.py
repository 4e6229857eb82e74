"""The process of a `qlora` command: how it starts, and how it ends with an error."""

import os
import shlex
import sys
from typing import TYPE_CHECKING, NoReturn

from flows.shutdown import Shutdown, this_program

if TYPE_CHECKING:
    from qlora_core.errors import QloraError
    from tasks.settings import Settings

SHUTDOWN = Shutdown()
"""Of this process: signals have one handler each."""


def start(resumable: bool = False) -> "Settings":
    """Settings for this command, with Prefect and MLflow told of them before they are imported.

    Args:
        resumable: whether the command can be stopped at any moment and goes on when it is typed again.
    """
    if resumable:
        SHUTDOWN.end_within_deadline()
    from tasks.settings import settings_of_environment

    settings = settings_of_environment()
    settings.configure_libraries()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _show_warnings()
    return settings


def _show_warnings() -> None:
    """Print warnings of ours on stderr, as sentences; Prefect keeps the console from all other loggers."""
    import logging

    logger = logging.getLogger("qlora")
    if logging.lastResort is not None and logging.lastResort not in logger.handlers:
        logger.addHandler(logging.lastResort)


def explain_and_exit(error: Exception) -> NoReturn:
    """Print an expected error as one message and end with its exit code.

    Raises:
        Exception: it is no expected one, and keeps its traceback.
    """
    from qlora_core.errors import QloraError, RegistryUnavailableError, SourceUnavailableError

    if not isinstance(error, QloraError):
        error = _explained(error)
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    if isinstance(error, RegistryUnavailableError | SourceUnavailableError):
        print(f"later: {this_program()} {shlex.join(sys.argv[1:])}", file=sys.stderr)  # noqa: T201
    sys.exit(error.exit_code)


def _explained(error: Exception) -> "QloraError":
    """What a failure of MLflow, Prefect or the machine means; any other is this program's and keeps its traceback."""
    from tasks.failures import explain, explain_machine, explain_prefect
    from tasks.settings import Settings

    explained = explain(error, Settings().mlflow_uri) or explain_prefect(error) or explain_machine(error)
    if explained is None:
        raise error
    return explained
