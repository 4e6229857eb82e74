"""A reverse proxy that lets an HTTP server fail in the middle of something."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx

Fault = Literal["500", "timeout", "down"]
LONG_S = 8.0
"""Longer than the client waits in these tests."""


class FaultyServer(ThreadingHTTPServer):
    """Passes requests on, until one asks for what is to fail; then that one and all after it fail."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.work_again()

    def fail(self, how: Fault, at: str) -> None:
        """Fail from the next request on whose path or body holds `at`."""
        self.how, self.at, self.failing = how, at.encode(), False

    def work_again(self) -> None:
        self.how, self.at, self.failing = None, None, False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server
        if server.at is not None and (server.at in self.path.encode() or server.at in body):
            server.failing = True
        if server.failing:
            self._fail()
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        got = httpx.request(self.command, server.upstream + self.path, content=body, headers=headers, timeout=60)
        self.send_response(got.status_code)
        self.send_header("Content-Type", got.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(got.content)))
        self.end_headers()
        self.wfile.write(got.content)

    def _fail(self) -> None:
        if self.server.how == "500":
            self.send_error(500)
            return
        if self.server.how == "timeout":
            time.sleep(LONG_S)
        self.close_connection = True
        self.connection.close()

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


@contextmanager
def faulty(upstream: str) -> Iterator[FaultyServer]:
    server = FaultyServer(upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
