"""One real Prefect server for all integration tests of a process."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

START_TIMEOUT_S = 180
SERVER_PORTS = (12_000, 32_000)
RANDOM = random.SystemRandom()
"""Seeded by nobody: two test processes do not try the same ports."""


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prefect server on its own database."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/api/health")
            yield f"http://127.0.0.1:{port}/api"
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture
def environment(prefect_api: str, tmp_path: Path, downloads: Path) -> dict[str, str]:
    """What a user's shell would hold; everything else goes to a folder of this test."""
    return shell(prefect_api, tmp_path / "home", downloads)


def shell(prefect_api: str, home: Path, downloads: Path) -> dict[str, str]:
    """The variables of a user's shell, for a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    return {
        **kept,
        "PREFECT_API_URL": prefect_api,
        "QLORA_HOME": str(home),
        "QLORA_DOWNLOADS": str(downloads),
        "COLUMNS": "160",
    }


def free_port() -> int:
    """One below those that the system hands out to clients: a server may take half a minute before it listens."""
    while True:
        port = RANDOM.randrange(*SERVER_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_until_healthy(url: str, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(f"nothing healthy at {url} after {timeout_s} s")
