"""A gate in front of a server: passes bytes on, can be shut as if the server were gone, and can stop at a word."""

import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 65536
LONGEST_STOP_S = 60


class Tripwire:
    """The first bytes of a client that match are held back until somebody says `go`."""

    def __init__(self, pattern: bytes) -> None:
        self.pattern = re.compile(pattern)
        self.hit, self._go = threading.Event(), threading.Event()

    def feel(self, chunk: bytes) -> None:
        if not self.hit.is_set() and self.pattern.search(chunk):
            self.hit.set()
            self._go.wait(LONGEST_STOP_S)

    def go(self) -> None:
        self._go.set()


class Gate:
    """Listens on a port of its own for one server."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self._links: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._wires: list[Tripwire] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.loses_answers = False
        """Requests arrive, and whoever sent them never hears of it."""
        self.open()

    @contextmanager
    def stop_at(self, pattern: bytes) -> Iterator[Tripwire]:
        """Hold whoever sends this."""
        wire = Tripwire(pattern)
        self._wires.append(wire)
        try:
            yield wire
        finally:
            wire.go()
            self._wires.remove(wire)

    @property
    def is_open(self) -> bool:
        return self._listener is not None

    def open(self) -> None:
        """Listen; always on the same port."""
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse connections and cut those that there are."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for link in list(self._links):
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.server_port)) as server:
            with self._lock:
                self._links |= {client, server}
            try:
                self._pump(client, server)
            finally:
                with self._lock:
                    self._links -= {client, server}

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        while True:
            for ready in select.select([client, server], [], [])[0]:
                chunk = ready.recv(CHUNK_BYTES)
                if not chunk or (ready is server and self.loses_answers):
                    return
                if ready is client:
                    for wire in list(self._wires):
                        wire.feel(chunk)
                (server if ready is client else client).sendall(chunk)
