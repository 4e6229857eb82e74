"""Serve a registered model with `transformers serve`."""

import os
import sys

from rich.console import Console

from tasks.serving import server_of
from tasks.settings import Settings

console = Console(highlight=False, soft_wrap=True)


def serve_model(model: str, host: str, port: int, settings: Settings) -> None:
    """Say how to ask the model, and become its server: signals and the exit code are the server's own.

    Raises:
        RegistryError: there is no such model or alias, or the server is not installed.
    """
    server = server_of(model, host, port, settings)
    console.print(f"[bold]{server.about}[/] answers at http://{host}:{port}/v1 in OpenAI's form, once it is loaded:\n")
    console.print(
        f"  curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d \\\n"
        f'    \'{{"model": "{server.model}", "messages": [{{"role": "user", "content": "..."}}]}}\'\n'
    )
    console.print("[dim]Ctrl-C ends[/]")
    sys.stdout.flush()
    os.chdir(server.folder)
    os.execve(sys.executable, [sys.executable, *server.arguments], {**os.environ, **server.environment})
