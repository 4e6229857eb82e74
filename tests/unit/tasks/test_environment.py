"""Proxies, homes and names of users that get in the way of libraries; in real processes, through a real proxy."""

import json
import os
import select
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qlora_core.errors import QloraError
from tasks.environment import check_proxies, give_user_a_home, keep_loopback_off_proxies, user_name

CHECKOUT = Path(__file__).resolve().parents[3]
DEAD = "http://127.0.0.1:9"
NOBODY = 12345
"""A uid without an entry in passwd."""
ASKS = """
import tasks, httpx, json, requests, sys, urllib.request
url, client = sys.argv[1], httpx.Client()
texts = [httpx.get(url).text, client.get(url).text, requests.get(url).text, urllib.request.urlopen(url).read().decode()]
print(json.dumps(texts))
"""


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"asked for {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Socks5(socketserver.BaseRequestHandler):
    """RFC 1928 without authentication, CONNECT only; every name is a name of this machine."""

    def handle(self):
        connection = self.request
        connection.recv(2 + connection.recv(2, socket.MSG_PEEK)[1])
        connection.sendall(b"\x05\x00")
        kind = connection.recv(4)[3]
        host = socket.inet_ntoa(connection.recv(4)) if kind == 1 else connection.recv(connection.recv(1)[0]).decode()
        port = int.from_bytes(connection.recv(2), "big")
        self.server.asked.append(host)
        with socket.create_connection(("127.0.0.1", port)) as there:
            connection.sendall(b"\x05\x00\x00\x01" + bytes(6))
            while ready := select.select([connection, there], [], [], 5)[0]:
                for source in ready:
                    block = source.recv(65536)
                    if not block:
                        return
                    (there if source is connection else connection).sendall(block)


@pytest.fixture
def web() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def answers(url: str, **variables: str) -> list[str]:
    """What each client of a fresh process gets."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    environment |= {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
    command = [sys.executable, "-c", ASKS, url]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "variables",
    [
        {"http_proxy": DEAD, "https_proxy": DEAD, "all_proxy": DEAD},
        {"HTTP_PROXY": DEAD, "no_proxy": "example.org"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
    ],
    ids=["dead", "beside a list", "socks"],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_requests_to_this_machine_go_through_no_proxy(web, variables, host):
    assert set(answers(f"http://{host}:{web}/x", **variables)) == {"asked for /x"}


def test_requests_to_others_still_go_through_the_proxy(web):
    """The proxy answers itself for a name that does not exist."""
    url = "http://hub.invalid/model"
    assert set(answers(url, http_proxy=f"http://127.0.0.1:{web}")) == {f"asked for {url}"}


def test_requests_to_others_go_through_a_socks_proxy(web):
    program = (
        "import tasks, httpx, requests, sys; u = sys.argv[1]; "
        "assert httpx.get(u).text == requests.get(u).text == 'asked for /m'"
    )
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Socks5) as proxy:
        proxy.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        variables = {**os.environ, "ALL_PROXY": f"socks5h://127.0.0.1:{proxy.server_address[1]}"}
        command = [sys.executable, "-c", program, f"http://hub.invalid:{web}/m"]
        subprocess.run(command, env=variables, check=True, timeout=120)
        proxy.shutdown()
    assert proxy.asked == ["hub.invalid"] * 2  # type: ignore[attr-defined]


def test_what_needs_no_proxy_already_stays_so(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    monkeypatch.setenv("no_proxy", "intern.example, 10.0.0.1")
    monkeypatch.setenv("NO_PROXY", "other.example")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.1.1:4200/api")
    keep_loopback_off_proxies()
    wanted = "intern.example,10.0.0.1,other.example,localhost,127.0.0.1,::1,127.0.1.1"
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == wanted
    monkeypatch.setenv("no_proxy", "*")
    keep_loopback_off_proxies()
    assert os.environ["NO_PROXY"] == "*"


@pytest.mark.parametrize("value", ["socks4://me:secret@proxy:1080", "ftp://proxy", "http://proxy:many"])
def test_a_proxy_of_another_kind_is_refused_in_words(value, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", value)
    with pytest.raises(QloraError, match=r"ALL_PROXY is .*; allowed are http://HOST:PORT, .*env -u ALL_PROXY") as said:
        check_proxies()
    assert "secret" not in str(said.value)


def test_the_socks_proxy_of_a_desktop_is_taken_for_socks_5(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    check_proxies()
    assert os.environ["ALL_PROXY"] == "socks5://127.0.0.1:1080/"


def as_nobody(*arguments: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The command as a uid without a name, which may read everything: this checkout may be root's own."""
    folder.chmod(0o777)
    for parent in folder.parents[:-1]:
        parent.chmod(parent.stat().st_mode | 0o111)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(CHECKOUT),
        "QLORA_HOME": str(folder / "home"),
        **variables,
    }
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *reads]
    command = [*user, sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)


needs_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root, with setpriv, becomes another user"
)


@needs_root
@pytest.mark.parametrize("variables", [{}, {"HOME": "/"}], ids=["no home", "home is the root"])
def test_a_user_without_a_passwd_entry_can_look_at_models(variables, tmp_path):
    result = as_nobody("models", folder=tmp_path, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert "No registered models yet" in result.stdout


@needs_root
@pytest.mark.minutes
@pytest.mark.parametrize("arguments", [["reconcile"], ["doctor"], ["store", "ls"]], ids=" ".join)
def test_a_user_without_a_passwd_entry_can_use_every_kind_of_command(arguments, tmp_path):
    result = as_nobody(*arguments, folder=tmp_path)
    assert "Traceback" not in result.stderr
    assert result.returncode == 0, result.stderr
    assert {found.name for found in tmp_path.iterdir()} <= {"home"}, "something was written beside the home"


@needs_root
def test_a_home_that_begins_with_a_tilde_is_refused_in_words_where_the_user_has_none(tmp_path):
    result = as_nobody("models", folder=tmp_path, QLORA_HOME="~/qlora")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: QLORA_HOME is ~/qlora, and uid {NOBODY} has no home")


@pytest.mark.parametrize("mode", [0o700, 0o500])
def test_a_user_with_a_home_and_a_name_keeps_them(mode, monkeypatch, tmp_path):
    """It may hold tokens of hubs, also where it is read-only."""
    tmp_path.chmod(mode)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "someone")
    give_user_a_home(tmp_path / "home")
    assert (os.environ["HOME"], user_name()) == (str(tmp_path), "someone")
