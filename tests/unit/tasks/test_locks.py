"""The lock of a registered model where a Prefect server keeps it, against a server that answers as a busy one does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import pytest

from qlora_core.errors import RegistryUnavailableError
from tasks import locks
from tasks.locks import registry_lock
from tasks.settings import Settings

LIMITS = "/api/v2/concurrency_limits/"
LOOK, MAKE = f"GET {LIMITS}qlora-registry-painter", f"POST {LIMITS}"
TAKE, GIVE_BACK = f"POST {LIMITS}increment-with-lease", f"POST {LIMITS}decrement-with-lease"


class Busy(BaseHTTPRequestHandler):
    """What Prefect answers, by method and path; of several answers the last stays."""

    answers: ClassVar[dict[str, list[tuple[int, object]]]]
    heard: ClassVar[list[str]]

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {self.path.split('?')[0]}"
        self.heard.append(asked)
        answers = self.answers.get(asked, [(200, {})])
        code, said = answers.pop(0) if len(answers) > 1 else answers[0]
        body = json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "0")  # Prefect's client sleeps for seconds where none is given
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of the server; one for all, since Prefect keeps its connection to the server of a limit."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/api"
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Settings]:
    """Of a team: a registry behind a server, and a Prefect server that gives the slot at once."""
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    limit = {"id": str(uuid4()), "name": "qlora-registry-painter", "limit": 1}
    Busy.heard = []
    Busy.answers = {
        "GET /api/csrf-token": [(404, {})],
        LOOK: [(404, {})],
        MAKE: [(201, limit)],
        TAKE: [(200, {"lease_id": str(uuid4()), "limits": [limit]})],
    }
    monkeypatch.setattr(locks, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield Settings(home=tmp_path)


def held(settings: Settings) -> bool:
    with registry_lock(settings, "painter"):
        return TAKE in Busy.heard and GIVE_BACK not in Busy.heard


def test_a_limit_that_somebody_else_made_in_between_is_as_good_as_ours(settings):
    Busy.answers[MAKE] = [(409, {"detail": "exists"})]
    assert held(settings)
    assert GIVE_BACK in Busy.heard


@pytest.mark.parametrize(
    ("asked", "code"), [(LOOK, 503), (MAKE, 503), *((TAKE, code) for code in sorted(locks.PUT_OFF))]
)
def test_a_server_that_has_too_much_to_do_is_asked_again(settings, asked, code):
    Busy.answers[asked] = [(code, {}), (code, {}), *Busy.answers[asked]]
    assert held(settings)
    assert Busy.heard.count(asked) == 3


def test_a_server_that_never_has_time_is_left_alone_in_the_end_and_nothing_was_done(settings, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.3)
    Busy.answers[TAKE] = [(503, {})]
    with pytest.raises(RegistryUnavailableError, match=r"too much to do for 0\.3 s to lock the aliases of painter"):
        held(settings)
    assert Busy.heard.count(TAKE) > 2


def test_what_the_server_refuses_is_not_asked_again(settings):
    Busy.answers[TAKE] = [(422, {"detail": "more slots than the limit"})]
    with pytest.raises(Exception, match="422"):
        held(settings)
    assert Busy.heard.count(TAKE) == 1


def test_what_was_done_stands_where_the_slot_cannot_be_given_back(settings):
    Busy.answers[GIVE_BACK] = [(503, {})]
    assert held(settings)
    with pytest.raises(ValueError, match="the work itself"), registry_lock(settings, "painter"):
        raise ValueError("the work itself")


def test_a_registry_on_a_server_without_a_prefect_server_is_locked_for_this_home_alone_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow.example")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for _ in range(2):
        with registry_lock(Settings(home=tmp_path), "painter"):
            pass
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "qlora"]
    assert warning.startswith("http://mlflow.example may be shared, but PREFECT_API_URL is not set")
    assert (tmp_path / "locks" / "registry-painter.lock").exists()


def test_a_registry_that_only_this_home_opens_needs_no_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with registry_lock(Settings(home=tmp_path), "painter"):
        pass
    assert [record for record in caplog.records if record.name == "qlora"] == []
