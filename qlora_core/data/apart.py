"""The fast tokenizer in a process of its own, so that Python's lock is left to reading and rendering.

Kitoken makes lists of millions of integers and holds the lock meanwhile: in a thread it costs the reader a third of its
speed. A process costs a third of a second once, which a small data set does not earn back.
"""

import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from threading import Lock

from kitoken import Kitoken

from qlora_core.data.fast_bpe import Encoded, FastBpe

TEXTS_HERE = 8192
"""So many are encoded in this process before another is started."""
PROGRAM = f"from {__name__} import serve; serve()"


class Apart:
    """Encodes as `fast` does, from the 8,193rd text on in another process; texts of several threads wait in line."""

    def __init__(self, fast: FastBpe) -> None:
        self._fast, self._lock, self._texts = fast, Lock(), 0
        self._child: subprocess.Popen[bytes] | None = None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids and places, see `FastBpe.encode`; texts of a process that was killed are encoded here."""
        with self._lock:
            self._texts += len(texts)
            if self._texts > TEXTS_HERE:
                try:
                    return self._encode_there(list(texts))
                except (OSError, EOFError, pickle.UnpicklingError):
                    self._texts = 0
                    self._end()
        return self._fast.encode(texts)

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _encode_there(self, texts: list[str]) -> Encoded:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._send(self._fast.definition)
        self._send(texts)
        assert self._child.stdout is not None
        encoded = pickle.load(self._child.stdout)
        assert isinstance(encoded, Encoded)
        return encoded

    def _send(self, value: object) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        pickle.dump(value, self._child.stdin, pickle.HIGHEST_PROTOCOL)
        self._child.stdin.flush()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()  # it holds nothing that could be lost
            child.communicate()


def serve() -> None:
    """Encode what comes through standard input until it ends, which it does when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        engine, widths, needs_nfc = pickle.load(source)
        fast = FastBpe(Kitoken(engine), widths, needs_nfc)
        while True:
            pickle.dump(fast.encode(pickle.load(source)), sink, pickle.HIGHEST_PROTOCOL)
            sink.flush()
    except EOFError:
        return
