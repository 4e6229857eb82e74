"""A flow that gets no memory any more ends, instead of waiting for ever for a thread that could not start.

Python waits for a new thread to say that it runs. One that finds no memory to say so is waited for without an end, and
with it whoever waits for this flow. What the flow has stored is whole: the same command goes on from there, as it does
after the kernel has killed a process for its memory.
"""

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_S = 5.0
PROBE_BYTES = 1 << 20
"""Less than any thread needs to start."""
PATIENCE = 3
"""Probes in a row that fail before it counts: others may give memory back, and most errors end a flow in words."""


@contextmanager
def ends_when_starved(every_s: float = EVERY_S) -> Iterator[None]:
    """Watch for as long as the block runs; the process is killed once there was nothing for `PATIENCE` probes.

    Args:
        every_s: seconds between two probes.
    """
    over: list[bool] = []
    threading.Thread(target=_watch, args=(over, every_s), daemon=True).start()
    try:
        yield
    finally:
        over.append(True)


def _watch(over: list[bool], every_s: float) -> None:
    """Needs nothing but what it has when it starts: waiting on an event would need a lock each time."""
    failed = 0
    while not over:
        try:
            time.sleep(every_s)
            mmap.mmap(-1, PROBE_BYTES).close()
            failed = 0
        except (MemoryError, OSError):
            failed += 1
        if failed >= PATIENCE:
            os.kill(os.getpid(), signal.SIGKILL)
