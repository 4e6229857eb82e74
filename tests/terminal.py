"""A `qlora` command at a terminal: a pseudo-terminal controls it, and keys are bytes that are written there."""

import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.servers import CHECKOUT

CTRL_C = b"\x03"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """One command, what its terminal shows, and the processes of its home."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._home = environment["QLORA_HOME"]
        self._keys, tty = pty.openpty()
        self._shown = bytearray()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            stdin=tty,
            stdout=tty,
            stderr=tty,
            env={**environment, "TERM": "xterm"},
            cwd=CHECKOUT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(tty)
        threading.Thread(target=self._read, daemon=True).start()

    def press(self, keys: bytes) -> None:
        os.write(self._keys, keys)

    def close(self) -> None:
        """As closing its window does: the kernel hangs up."""
        os.close(self._keys)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def shown(self) -> str:
        """Everything that was written there, without colours and movements of the cursor."""
        return ESCAPE.sub("", bytes(self._shown).decode(errors="replace"))

    def left(self, patience_s: float) -> list[str]:
        """Command lines of the processes of this home that do not end within a moment."""
        deadline = time.monotonic() + patience_s
        while (left := processes_of(Path(self._home))) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(process.info["cmdline"]) for process in left]

    def _read(self) -> None:
        with suppress(OSError):  # what Linux says at the end
            while chunk := os.read(self._keys, 65536):
                self._shown += chunk


def processes_of(home: Path) -> list[psutil.Process]:
    """Running processes that were started for a home."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        with suppress(psutil.Error):
            if process.environ().get("QLORA_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)  # also embedded servers, whose session is their own
    return found
