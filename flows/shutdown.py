"""How a command ends on Ctrl-C, SIGTERM and the SIGHUP of a closed terminal: once, in order, and within seconds.

The first signal raises an exception, so that children are ended, MLflow runs get their status and Prefect runs their
state. A second one must not break that work off. What takes longer than `DEADLINE_S` is given up: whatever it was
waiting for, the next command of this home finds what was left open and ends it.
"""

import os
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEADLINE_S = 8.0
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "the end of its terminal"}
SHOW_CURSOR = "\x1b[?25h"


class Shutdown:
    """The handler of the signals that end a command."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self.number: int | None = None
        """The signal that ends the command; None as long as there was none."""
        self.resumable = False
        """Whether the same command goes on where it stopped."""
        self.over = False
        """Whether all that is left to do is to end."""

    def listen(self) -> None:
        """Handle the signals from now on, but for those that whoever started this process has switched off."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                signal.signal(number, self)

    def end_within_deadline(self) -> None:
        """For a command that can be resumed: from now on only the first signal counts, and it ends the process.

        It needs a thread that waits from the start: a handler that starts one may wait for a lock that it holds itself.
        """
        self.resumable = True
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        # The interpreter writes each signal there at once, also while C code keeps Python from calling the handler.
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), daemon=True).start()

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Raise what ends the command."""
        if self.over or (self.number is not None and self.resumable):
            return
        self.number = number
        if number == signal.SIGHUP:
            _leave_terminal()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """As a shell says that a signal ended a program."""
        return 128 + (self.number or 0)

    def explain(self) -> None:
        """Say what is safe, and what to type to go on."""
        assert self.number is not None
        print(  # noqa: T201
            f"stopped by {NAMES[signal.Signals(self.number)]}: finished stages and the newest checkpoint are kept, and "
            f"nothing half done counts. To go on from there: {this_program()} {shlex.join(sys.argv[1:])}",
            file=sys.stderr,
        )

    def _watch(self, receiver: int) -> None:
        """Give up what does not end."""
        while not (ending := [number for number in os.read(receiver, 64) if number in SIGNALS]):
            continue
        time.sleep(self._deadline_s)
        self._give_up(ending[0])

    def _give_up(self, number: int) -> NoReturn:
        self.number = self.number or number
        try:
            if sys.stderr.isatty():
                sys.stderr.write(SHOW_CURSOR)
            print(f"\nit did not end in order within {self._deadline_s:.0f} s", file=sys.stderr)  # noqa: T201
            self.explain()
            sys.stderr.flush()
        finally:
            os._exit(self.exit_code)


@contextmanager
def keeps_signals() -> Iterator[None]:
    """Inside a flow: keep our handler of SIGTERM, for which Prefect puts one of its own, which raises every time."""
    ours, prefects = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if not isinstance(ours, Shutdown):  # a worker's flow: the worker knows what its SIGTERM means
        yield
        return
    signal.signal(signal.SIGTERM, ours)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, prefects)


def this_program() -> str:
    """How this user calls the command: by name where it is on the path, else by where it is."""
    return "qlora" if shutil.which("qlora") else os.path.relpath(sys.argv[0])


def _leave_terminal() -> None:
    """A terminal that is gone fails every write, also those that only say how the command ends."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
