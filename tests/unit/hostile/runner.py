"""Gives every hostile input to what reads it, in one process that is watched: `python -m … FOLDER` prints a line each.

An input may be refused with an error that this package raises on purpose, or be read; anything else is a finding:
another exception, more than ten seconds, more than a GiB of memory, a file written outside the folder.
"""

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_S, BUSY = 10, 6
MOST_BYTES = 1 << 30
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LINKS = {"os.symlink", "os.link", "os.rename"}
CHANGES = {"os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", *LINKS}
FREE = ("/dev/null", "/dev/tty", "/proc/", str(Path.home() / ".cache"))
"""What everybody writes: the clients of hubs keep notes in the cache of the user."""


class TooLongError(BaseException):
    """It took more than its time."""


class Watch:
    """Notes what is written outside a folder, as Python itself sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outside = str(folder.resolve()), list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        below_an_open_folder = event != "open" and isinstance(arguments[-1], int) and arguments[-1] >= 0
        if (writes or event in CHANGES) and not below_an_open_folder:  # whose own removal was heard before
            self._look(arguments[1 if event in LINKS else 0])

    def _look(self, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(path))
            if not place.startswith((self.folder, *FREE)):
                self.outside.append(place)


@contextmanager
def limited() -> Iterator[None]:
    """Ten seconds of work; on the clock of the wall many more, since other tests may be at work too."""

    def late(*_: object) -> None:
        raise TooLongError(f"more than {MOST_S} s")

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, MOST_S)
    signal.alarm(MOST_S * BUSY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give(read: Callable[[], object], watch: Watch) -> tuple[str, str]:
    """What became of one input: `refused`, `read`, or a finding, and in what words."""
    from qlora_core.errors import QloraError

    before, said = peak_bytes(), ""
    watch.outside.clear()
    try:
        with limited():
            read()
        kind = "read"
    except QloraError as error:
        kind, said = "refused", str(error)
    except TooLongError as error:
        return "hangs", str(error)
    except BaseException as error:
        return "crashes", "".join(traceback.format_exception(error))[-3000:]
    if peak_bytes() - before > MOST_BYTES:
        return "grows", f"by {(peak_bytes() - before) / 2**30:.1f} GiB"
    if watch.outside:
        return "writes outside", ", ".join(watch.outside[:3])
    return kind, said


def main(folder: Path) -> None:
    from tests.unit.hostile import inputs

    watch = Watch(folder)
    for surface, name, read in inputs.all_inputs(folder):
        kind, said = give(read, watch)
        print(json.dumps({"surface": surface, "name": name, "kind": kind, "said": said}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
