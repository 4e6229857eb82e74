"""A `qlora` command that runs while the test does something to it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.integration.faults.zygote import PIDS
from tests.servers import CHECKOUT, running

START_TIMEOUT_S = 300
PATIENCE_S = 15


class Flow:
    """One command, its output, and its processes."""

    def __init__(self, pid: int, link: "socket.socket | subprocess.Popen[bytes]", log: Path, pids: Path) -> None:
        self.pid, self._link, self.log, self._pids = pid, link, log, pids
        self.code: int | None = None

    def wait(self, timeout_s: float) -> int | None:
        """The exit code; None if it has not ended by then."""
        if self.code is not None:
            return self.code
        if isinstance(self._link, subprocess.Popen):
            try:
                self.code = self._link.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return None
            return self.code
        self._link.settimeout(max(timeout_s, 0.001))
        try:
            answer = self._link.recv(64)
        except TimeoutError:
            return None
        self.code = int(answer)
        self._link.close()
        return self.code

    def has_ended(self) -> bool:
        return self.code is not None or self.wait(0) is not None

    def children(self) -> list[psutil.Process]:
        """Processes that do a stage's work now."""
        try:
            return [child for child in psutil.Process(self.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def left(self) -> list[int]:
        """Numbers of its processes that do not end within a moment, now that it has ended."""
        numbers = [self.pid, *map(int, self._pids.read_text().split() if self._pids.is_file() else ())]
        deadline = time.monotonic() + PATIENCE_S
        while (left := [number for number in numbers if is_running(number)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Launcher:
    """Starts commands; `path` is the socket of a zygote, None starts them one by one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> Flow:
        pids = log.with_suffix(".pids")
        environment = {**environment, PIDS: str(pids)}
        if self.path is None:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "flows.cli", *arguments],
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd=CHECKOUT,
                )
            return Flow(process.pid, process, log, pids)
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(self.path))
        request = {"arguments": arguments, "environment": environment, "log": str(log)}
        link.sendall(json.dumps(request).encode() + b"\n")
        return Flow(int(link.recv(64)), link, log, pids)


@contextmanager
def launcher(folder: Path, environment: dict[str, str]) -> Iterator[Launcher]:
    """A zygote with this environment, or none where QLORA_FAULTS_EXEC is set."""
    if os.environ.get("QLORA_FAULTS_EXEC"):
        yield Launcher(None)
        return
    path = folder / "zygote"
    command = [sys.executable, "-m", "tests.integration.faults.zygote", str(path)]
    with running(command, folder / "zygote.log", environment) as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not path.exists():
            assert process.poll() is None, (folder / "zygote.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Launcher(path)
