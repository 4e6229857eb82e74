"""A local receiver of what notification blocks send."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prefect.blocks.notifications import CustomWebhookNotificationBlock

from tests.team import wait_for


class Receiver(ThreadingHTTPServer):
    """Takes what a webhook sends, and answers as it is told to."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Receives)
        self.status, self.received = status, list[dict[str, str]]()

    def heard(self, text: str) -> dict[str, str]:
        """The message with this text in its subject, waited for."""
        return wait_for(f"message about {text}", lambda: [m for m in self.received if text in m["subject"]], 60)[0]


class Receives(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def webhook(name: str, status: int = 200) -> Iterator[Receiver]:
    """A receiver, and the block of the Prefect server that sends to it."""
    with Receiver(status) as receiver:
        Thread(target=receiver.serve_forever, daemon=True).start()
        message = {"subject": "{{subject}}", "body": "{{body}}"}
        url = f"http://127.0.0.1:{receiver.server_port}"
        CustomWebhookNotificationBlock(name=name, url=url, json_data=message).save(name, overwrite=True)
        yield receiver
        receiver.shutdown()
