"""`qlora` commands, forked from a process that has imported everything."""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.zygote import PIDS

CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND_TIMEOUT_S = 900
START_TIMEOUT_S = 300
READ_LATE = ("QLORA_", "PREFECT_", "MLFLOW_", "AWS_", "COLUMNS", "PYTEST_")
"""Variables that are read when a command runs; the others when a library is imported."""
READ_BY_PYTHON = ("LANG", "LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8")
"""Variables that say how Python itself starts, so that no fork can follow them."""
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

    def start(self, arguments: list[str], environment: dict[str, str], log: Path, errors: Path | None = None) -> Flow:
        """Start a command; `errors` gets what it says on stderr, `log` where that is None."""
        errors = errors or log
        pids = log.with_suffix(".pids")
        environment = {**environment, PIDS: str(pids)}
        if self.path is None:
            with log.open("ab") as output, errors.open("ab") as said:
                process = subprocess.Popen(
                    [sys.executable, "-m", "flows.cli", *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=said,
                    start_new_session=True,
                    cwd=CHECKOUT,
                )
            return Flow(process.pid, process, log, pids)
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(self.path))
        files = {"output": str(log), "errors": str(errors)}
        request = {"arguments": arguments, "environment": environment, **files}
        link.sendall(json.dumps(request).encode() + b"\n")
        return Flow(int(link.recv(64)), link, log, pids)


def qlora(*arguments: str | Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    words = list(map(str, arguments))
    with TemporaryDirectory(prefix="qlora-command-") as folder:
        output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        flow = launcher(environment).start(words, environment, output, errors)
        code = flow.wait(COMMAND_TIMEOUT_S)
        if code is None:
            os.killpg(flow.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, COMMAND_TIMEOUT_S, output.read_bytes(), errors.read_bytes())
        return subprocess.CompletedProcess(words, code, output.read_text(), errors.read_text())


def launcher(environment: Mapping[str, str]) -> Launcher:
    """What starts commands in this environment: the zygote of this test process, which ends with it.

    One for all environments that differ only in what is read when a command runs. Real commands are started where
    QLORA_TESTS_EXEC is set, and where Python itself is to start in another way.
    """
    started_otherwise = any(environment.get(name) != os.environ.get(name) for name in READ_BY_PYTHON)
    if started_otherwise or os.environ.get("QLORA_TESTS_EXEC"):
        return Launcher(None)
    early = {name: value for name, value in environment.items() if not name.startswith(READ_LATE)}
    return _zygote(tuple(sorted(early.items())))


@cache
def _zygote(environment: tuple[tuple[str, str], ...]) -> Launcher:
    folder = Path(tempfile.mkdtemp(prefix="qlora-zygote-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, log = folder / "socket", folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(path)],
            env={**dict(environment), "QLORA_HOME": str(folder / "home")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=CHECKOUT,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return Launcher(path)
