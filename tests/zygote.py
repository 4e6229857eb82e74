"""Starts `qlora` commands without their imports: a process that has imported everything forks for each.

Imports are nine tenths of what a tiny retraining costs. A fork is a process like any other: it has its own number, is
the leader of its session, gets signals, ends with its parent. What it does not have is a command line of its own, so
each leaves its number in a file. With QLORA_TESTS_EXEC=1 real commands are started instead.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PIDS = "QLORA_TEST_PIDS"
"""Environment variable: the file that gets the numbers of all processes of a command."""
RETRY_SOON = "QLORA_TEST_RETRY_SOON"
"""Environment variable: set where stages wait for moments, not minutes, before they try again."""
FIRST_INHERITED, LAST_INHERITED = 3, 4096


class Forked:
    """What `qlora_core.process` uses of `subprocess.Popen`, by a fork."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: Any = None, **_: Any) -> None:
        verb = command.index("qlora_core.process")
        out, errors = (stdout.fileno(), stdout.fileno()) if stdout else (1, 2)
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            become(out, errors, env, lambda: _work(command[verb + 1 :]))
        _remember(self.pid)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def become(out: int, errors: int, environment: dict[str, str], main: Any) -> None:
    """Be a new program: own session, output to files, nothing inherited but what was imported; never returns."""
    code = 70
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(errors, 2)
        os.closerange(FIRST_INHERITED, LAST_INHERITED)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        random.seed()
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _work(arguments: list[str]) -> int:
    from qlora_core.process import main

    return main(arguments)


def _command(arguments: list[str]) -> int:
    import atexit

    import qlora_core.process
    from flows.cli import main

    popen = SimpleNamespace(**{name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")})
    popen.Popen = Forked
    qlora_core.process.subprocess = popen  # type: ignore[assignment]
    if RETRY_SOON in os.environ:
        _retry_soon()
    _read_environment_again()
    sys.argv = ["qlora", *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # the last events of Prefect are sent there


def _read_environment_again() -> None:
    """Prefect reads its variables when it is imported."""
    import prefect.context

    from qlora_core.errors import QloraError
    from tasks.settings import settings_of_environment

    with suppress(QloraError):  # the command itself says what is wrong with a variable
        settings_of_environment().configure_libraries()
        prefect.context.refresh_global_settings_context()


def _retry_soon() -> None:
    """Retries wait as little as everything else here."""
    import flows.retrain

    for name in ("download", "prepare", "train", "merge", "evaluate", "register", "promote"):
        getattr(flows.retrain, name).retry_delay_seconds = [0.2, 0.5, 1]


def _remember(pid: int) -> None:
    with Path(os.environ[PIDS]).open("a") as file:
        file.write(f"{pid}\n")


def import_all() -> None:
    """Everything that a retraining imports, before any thread is started."""
    from tasks.settings import Settings

    Settings().configure_libraries()
    import importlib

    for name in (
        "flows.cli",
        "flows.commands",
        "flows.reconcile",
        "flows.retrain",
        "flows.show",
        "tasks.preflight",
        "tasks.orphans",
        "mlflow.transformers",
        "transformers",
        "qlora_core.hub.repository",
        "qlora_core.hub.local",
        "qlora_core.hub.snapshot",
        "qlora_core.training.worker",
        "qlora_core.merging.worker",
        "qlora_core.merging.reload",
        "qlora_core.evaluation.worker",
        "transformers.models.llama.modeling_llama",
        "bitsandbytes",
    ):
        importlib.import_module(name)


def serve(path: str) -> None:
    """Fork for every request on a socket; answers a number, later an exit code.

    A request is a line of JSON: `{arguments, environment, output, errors}`, the last two files.
    """
    import_all()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    listener.setblocking(False)
    waiting: dict[int, socket.socket] = {}
    parent = os.getppid()
    while os.getppid() == parent:
        with suppress(BlockingIOError):
            _begin(listener.accept()[0], waiting)
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with waiting.pop(pid) as link, suppress(OSError):
                    link.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        time.sleep(0.01)


def _begin(link: socket.socket, waiting: dict[int, socket.socket]) -> None:
    link.setblocking(True)
    request = json.loads(link.makefile().readline())
    files = [os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("output", "errors")]
    pid = os.fork()
    if pid == 0:
        become(*files, request["environment"], lambda: _command(request["arguments"]))
    for file in files:
        os.close(file)
    waiting[pid] = link
    link.sendall(f"{pid}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1])
