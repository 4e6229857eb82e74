"""`qlora ui` says what stands in its way, and takes no other server for its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows import ui
from qlora_core.errors import QloraError
from tests.commands import qlora
from tests.integration.conftest import free_port, wait_until_healthy
from tests.servers import running


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str]:
    """A shell without a team's servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    return {**kept, "QLORA_HOME": str(tmp_path / "home")}


@contextmanager
def listening(folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """A web server of somebody else that answers every health check; its port."""
    (folder / "api").mkdir(parents=True)
    for name in ("health", "api/health"):
        (folder / name).write_text("OK")
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), str(port)]
    with running(command, folder / "log.txt", environment):
        wait_until_healthy(f"http://127.0.0.1:{port}/health")
        yield port


@pytest.mark.parametrize("option", ["--mlflow-port", "--prefect-port"])
def test_a_port_that_another_home_holds_is_named_with_that_home(option, alone, tmp_path):
    with listening(tmp_path / "other", {**alone, "QLORA_HOME": "/srv/another-home"}) as port:
        others = {"--mlflow-port": free_port(), "--prefect-port": free_port(), option: port}
        arguments = [str(part) for pair in others.items() for part in pair]
        result = qlora("ui", "--no-browser", *arguments, environment=alone)
    assert result.returncode == 1, result.stdout
    assert f":{port}: taken by process" in result.stderr
    assert "a server of the home /srv/another-home" in result.stderr
    assert f"with {option}" in result.stderr
    assert str(port) not in result.stdout, "the address of another home's server is given out as ours"


def test_a_damaged_database_is_named_before_any_server_starts(alone, tmp_path):
    database = tmp_path / "home" / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"this was a database once " * 400)
    ports = ["--mlflow-port", str(free_port()), "--prefect-port", str(free_port())]
    result = qlora("ui", "--no-browser", *ports, environment=alone)
    assert result.returncode != 0
    assert str(database) in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "home" / "logs").exists()


def test_servers_of_a_team_are_named_and_none_is_started(alone, tmp_path):
    team = {"MLFLOW_TRACKING_URI": "https://me:secret@mlflow.example.org", "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    result = qlora("ui", "--no-browser", environment={**alone, **team})
    assert result.returncode == 0, result.stderr
    assert "https://mlflow.example.org" in result.stdout
    assert "http://127.0.0.1:9 " in result.stdout
    assert "secret" not in result.stdout
    assert not (tmp_path / "home").exists()


def child(folder: Path, script: str, port: int) -> ui.LocalServer:
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(["sh", "-c", script], stdout=output, stderr=output)
    return ui.LocalServer("MLflow", f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/health", log, process)


def test_a_server_that_answers_busy_is_asked_with_pauses(tmp_path, monkeypatch):
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(ui, "START_TIMEOUT_S", 2.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        server = child(tmp_path, "echo no database yet; exec sleep 60", web.server_address[1])
        try:
            with pytest.raises(QloraError, match="last answer: 503 Service Unavailable") as refused:
                ui._wait_until_ready(server)
        finally:
            server.process.kill()
            server.process.wait()
            web.shutdown()
    assert "no database yet" in str(refused.value)
    assert 1 <= len(asked) <= 10


def test_a_server_that_ends_later_is_an_error_in_words(tmp_path):
    server = child(tmp_path, "echo the database has gone; exit 3", 9)
    with pytest.raises(QloraError, match="MLflow server ended with code 3 by itself") as refused:
        ui._keep([server])
    assert "the database has gone" in str(refused.value)
