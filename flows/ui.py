"""Serve the MLflow UI and the Prefect UI of the local stores; a team's servers are only named."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from qlora_core.errors import QloraError
from qlora_core.process import tail
from tasks.settings import Settings, without_secrets

console = Console(highlight=False, soft_wrap=True)
HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
POLL_S = 0.3
MLFLOW, PREFECT = "MLflow", "Prefect"
HOME = "QLORA_HOME"
"""In the environment of a server it names the home whose server that is."""


class LocalServer(NamedTuple):
    """A server that was started here."""

    name: str
    page: str
    health: str
    """The address that answers 200 once it is ready."""
    log: Path
    process: "subprocess.Popen[bytes]"


def serve(settings: Settings, mlflow_port: int, prefect_port: int, browser: bool) -> None:
    """Say where both UIs are; start a server for each store of this home, and keep these until Ctrl-C.

    Raises:
        QloraError: a port is taken, or a server did not come up or ended by itself.
    """
    pages, servers = _team_pages(settings), list[LocalServer]()
    ports = {MLFLOW: mlflow_port, PREFECT: prefect_port}
    local = {name: port for name, port in ports.items() if name not in pages}
    for name, page in pages.items():
        _show(name, page, browser, "the team's server")
    if local:
        settings.make_home()
    for name, port in local.items():
        _require_free(name, port, settings)
    try:
        if MLFLOW in local:
            servers.append(_start_mlflow(settings, mlflow_port))
        if PREFECT in local:
            servers.append(_start_prefect(settings, prefect_port))
        for server in servers:
            _wait_until_ready(server)
            _show(server.name, server.page, browser)
        if servers:
            console.print(
                f"[dim]Ctrl-C stops {'both' if len(servers) > 1 else 'it'}; logs are in {servers[0].log.parent}[/]"
            )
            _keep(servers)
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        _stop(servers)


@contextmanager
def local_prefect(port: int) -> Iterator[None]:
    """The Prefect server of this home, for as long as the block; call it before Prefect is imported.

    Raises:
        QloraError: the port is taken, or it did not come up.
    """
    settings = Settings()
    _require_free(PREFECT, port, settings)
    server = _start_prefect(settings, port)
    try:
        _wait_until_ready(server)
        os.environ["PREFECT_API_URL"] = f"{server.page}/api"
        _show(server.name, server.page, browser=False)
        yield
    finally:
        _stop([server])


def _team_pages(settings: Settings) -> dict[str, str]:
    """Name and address of each server that the environment names."""
    pages = {}
    if (settings.mlflow_server or "").startswith("http"):
        pages[MLFLOW] = without_secrets(settings.mlflow_uri)
    if not settings.embedded_prefect:
        api = os.environ["PREFECT_API_URL"].rstrip("/").removesuffix("/api")
        pages[PREFECT] = without_secrets(os.environ.get("PREFECT_UI_URL") or api)
    return pages


def _show(name: str, page: str, browser: bool, note: str = "") -> None:
    console.print(f"{name:<8} {escape(page)}" + (f"  [dim]({note})[/]" if note else ""))
    if browser and sys.stdout.isatty():
        webbrowser.open(page)


def _start_mlflow(settings: Settings, port: int) -> LocalServer:
    store = ["--backend-store-uri", settings.mlflow_uri]
    place = ["--default-artifact-root", settings.mlflow_artifacts] if settings.mlflow_artifacts else []
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1", *store, *place]
    page = f"http://{HOST}:{port}"
    return LocalServer(MLFLOW, page, f"{page}/health", *_start(settings, "mlflow-ui", command))


def _start_prefect(settings: Settings, port: int) -> LocalServer:
    """Its pages ask the server at port 4200 unless they are told."""
    page = f"http://{HOST}:{port}"
    command = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    log, process = _start(settings, "prefect-server", command, PREFECT_SERVER_UI_API_URL=f"{page}/api")
    return LocalServer(PREFECT, page, f"{page}/api/health", log, process)


def _start(
    settings: Settings, name: str, command: Sequence[str], **more: str
) -> tuple[Path, "subprocess.Popen[bytes]"]:
    """A process that writes to `logs/NAME.log` in the home; the log before it is kept beside it."""
    log = settings.root / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".old.log"))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", HOME: str(settings.root), **more}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    return log, process


def _wait_until_ready(server: LocalServer) -> None:
    import httpx

    deadline, said = time.monotonic() + START_TIMEOUT_S, "nothing"
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise _ended(server, "before it answered")
        try:
            answer = httpx.get(server.health, timeout=2, trust_env=False)
            if answer.status_code == 200 and _listens(server):
                return
            said = f"{answer.status_code} {answer.reason_phrase}"
        except httpx.HTTPError as error:
            said = type(error).__name__
        time.sleep(POLL_S)
    raise QloraError(
        f"{server.name} was not ready at {server.health} after {START_TIMEOUT_S:.0f} s; its last answer: {said}. "
        f"{_log_of(server)}"
    )


def _listens(server: LocalServer) -> bool:
    """Whether it is this server that answers at its port, and not another one that was faster."""
    import psutil

    port = int(server.page.rpartition(":")[2])
    try:
        started = psutil.Process(server.process.pid)
        family = [started, *started.children(recursive=True)]
        return any(found.laddr.port == port for one in family for found in one.net_connections("tcp") if found.laddr)
    except psutil.NoSuchProcess:  # it ends; the next look says how
        return False


def _keep(servers: Sequence[LocalServer]) -> None:
    while True:
        for server in servers:
            if server.process.poll() is not None:
                raise _ended(server, "by itself")
        time.sleep(POLL_S)


def _stop(servers: Sequence[LocalServer]) -> None:
    for server in servers:
        server.process.terminate()
    for server in servers:
        server.process.wait()


def _ended(server: LocalServer, when: str) -> QloraError:
    code = server.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return QloraError(f"the {server.name} server {how} {when}. {_log_of(server)}")


def _log_of(server: LocalServer) -> str:
    return f"The end of {server.log}:\n{tail(server.log) or '(nothing)'}"


def _require_free(name: str, port: int, settings: Settings) -> None:
    """Refuse a port that cannot be listened at: whatever answers there would be taken for the server of this home."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: one that has just ended is no matter
        try:
            probe.bind((HOST, port))
            return
        except OSError as error:
            why = f"taken by {_holder(port, settings)}" if error.errno == errno.EADDRINUSE else str(error.strerror)
    option = f"--{name.lower()}-port"
    raise QloraError(f"{name} cannot listen at {HOST}:{port}: {why}. Choose another port with {option}, or stop that")


def _holder(port: int, settings: Settings) -> str:
    """Which process listens at a port, and for which home where that is a server of ours."""
    import psutil

    try:
        for found in psutil.net_connections("tcp"):
            if (
                found.pid is not None
                and found.laddr
                and found.laddr.port == port
                and found.status == psutil.CONN_LISTEN
            ):
                process = psutil.Process(found.pid)
                home = process.environ().get(HOME)
                which = "this home" if home == str(settings.root) else f"the home {home}"
                what = f"a server of {which}" if home else " ".join(process.cmdline())[:100]
                return f"process {found.pid} ({what})"
    except psutil.Error:  # somebody else's process
        pass
    return "another process"
