"""Serve the MLflow UI and the Prefect UI of the local stores."""

import os
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from qlora_core.errors import QloraError
from tasks.settings import Settings

console = Console(highlight=False, soft_wrap=True)
HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0


def serve(settings: Settings, mlflow_port: int, prefect_port: int, browser: bool) -> None:
    """Start both servers, wait until they answer, and keep them until Ctrl-C.

    Raises:
        QloraError: a server did not come up.
    """
    settings.make_home()
    servers = {
        f"http://{HOST}:{mlflow_port}/health": ("MLflow", _start(_mlflow(settings, mlflow_port))),
        f"http://{HOST}:{prefect_port}/api/health": ("Prefect", _start_prefect(prefect_port)),
    }
    try:
        for url, (name, process) in servers.items():
            _wait_until_healthy(name, url, process)
            page = url.removesuffix("/api/health").removesuffix("/health")
            console.print(f"{name:<8} {page}")
            if browser and sys.stdout.isatty():
                webbrowser.open(page)
        console.print("[dim]Ctrl-C stops both[/]")
        while all(process.poll() is None for _, process in servers.values()):
            time.sleep(0.5)
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        for _, process in servers.values():
            process.terminate()
        for _, process in servers.values():
            process.wait()


@contextmanager
def local_prefect(port: int) -> Iterator[None]:
    """The Prefect server of this home, for as long as the block; call it before Prefect is imported.

    Raises:
        QloraError: it did not come up.
    """
    server = _start_prefect(port)
    try:
        _wait_until_healthy("Prefect", f"http://{HOST}:{port}/api/health", server)
        os.environ["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
        console.print(f"Prefect  http://{HOST}:{port}")
        yield
    finally:
        server.terminate()
        server.wait()


def _start(command: list[str], **more: str) -> "subprocess.Popen[bytes]":
    command, environment = [sys.executable, "-m", *command], {**os.environ, **more}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _mlflow(settings: Settings, port: int) -> list[str]:
    store = ["--backend-store-uri", settings.mlflow_uri]
    place = ["--default-artifact-root", settings.mlflow_artifacts] if settings.mlflow_artifacts else []
    return ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1", *store, *place]


def _start_prefect(port: int) -> "subprocess.Popen[bytes]":
    """Its pages ask the server at port 4200 unless they are told."""
    command = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return _start(command, PREFECT_SERVER_UI_API_URL=f"http://{HOST}:{port}/api")


def _wait_until_healthy(name: str, url: str, process: "subprocess.Popen[bytes]") -> None:
    import httpx

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise QloraError(f"{name} did not answer at {url}; is the port taken? Choose another with --{name.lower()}-port")
