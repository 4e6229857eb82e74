"""The Prefect server that a command brings along where none is set."""

import os
import subprocess
import sys
from typing import Any

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from qlora_core.process import start_apart
from tasks.orphans import SERVER, end_stray_servers
from tasks.settings import Settings


class EmbeddedServer(SubprocessASGIServer):
    """Prefect's own embedded server, in a session of its own.

    Prefect starts it in the session of the command. Ctrl-C at a terminal then ends the server first, and the command
    asks for minutes a server that is gone how to end.
    """

    def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
        folder = str(prefect.__module_path__.parent)
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        how = ["--app-dir", folder, "--factory", SERVER, "--log-level", "error", "--lifespan", "on"]
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        embedded = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        return start_apart(
            [sys.executable, "-m", "uvicorn", *how, *where], environment={**os.environ, **embedded, **settings}
        )


def start_embedded_server(settings: Settings) -> None:
    """Have a Prefect server where the team has none, until this process ends; a killed one takes it along.

    Call it in the main thread, see `start_apart`.
    """
    if not settings.embedded_prefect:
        return
    end_stray_servers(settings)
    # Prefect's clients find the one that is made first; Prefect stops it at exit, after its last events.
    EmbeddedServer().start()
