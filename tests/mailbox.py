"""A mail server that keeps what it is sent: as much of SMTP (RFC 5321) as a client needs who signs in by nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import cast


class Mailbox(ThreadingTCPServer):
    """Listens on a port of its own."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Session)
        self.received = list[EmailMessage]()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Session(StreamRequestHandler):
    server: Mailbox

    def handle(self) -> None:
        self._say("220 here")
        for line in self.rfile:
            match line.split()[0].upper():
                case b"DATA":
                    self._say("354 go on")
                    content = b"".join(iter(self.rfile.readline, b".\r\n"))
                    self.server.received.append(cast(EmailMessage, message_from_bytes(content, policy=policy.default)))
                    self._say("250 kept")
                case b"QUIT":
                    self._say("221 bye")
                    return
                case _:
                    self._say("250 good")

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


@contextmanager
def mailbox() -> Iterator[Mailbox]:
    """The server, for as long as the block lasts."""
    with Mailbox() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
