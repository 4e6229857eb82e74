"""Run a stage's work in its own process group and follow what it reports.

A child gets one folder, kept inside the stage's work directory:

    spec.json       what to do, written by the parent
    events.jsonl    what it reports (see `events.py`), appended by the child, followed by the parent
    delivered       how many bytes of events.jsonl were handed on, so that nothing is reported twice
    result.json     the record it made
    error-N.json    the error that rank N met, and when
    log.txt         everything that it or its libraries print

GPU memory is back when the child ends, an out-of-memory kill does not take the flow down, and no child outlives its
parent: it asks the kernel to be killed when the parent dies, and the parent kills the whole group whenever it leaves.
"""

import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_core.artifacts import Record
from qlora_core.errors import ERRORS_BY_NAME, ChildError, QloraError
from qlora_core.events import EVENT, Metrics, Note, Progress, Report
from qlora_core.limits import usable_cpus
from qlora_core.store import write_atomically

POLL_S = 0.1
GRACE_S = 3.0
"""For a group that is told to end; a child has nothing to save that its last checkpoint has not."""
LOG_LINES_IN_ERROR = 15
RESULT, ERRORS = "result.json", "error-*.json"
KILLED_RANK = re.compile(r"Root Cause.*?\brank +: (\d+).*?\bexitcode +: -(\d+)", re.DOTALL)
"""In torchrun's report: the process that ended first, where a signal has ended it."""
PR_SET_PDEATHSIG = 1
LAUNCHER = "QLORA_LAUNCHER_PID"
"""Where a rank finds the number of the torchrun that started it."""
MASTER = "PET_MASTER_ADDR"
"""torchrun's own variable for the node that the others meet at; PET_MASTER_PORT goes with it."""


class Group(Record):
    """The processes that work on one spec together."""

    processes: int = 1
    """On each node."""
    nodes: int = 1
    rendezvous: bool = False
    """Start torchrun even for a single process, because the work needs a process group."""

    @property
    def is_launched(self) -> bool:
        """Whether torchrun starts them."""
        return self.processes * self.nodes > 1 or self.rendezvous


class ChildFailure(Record):
    """The error that one process of a group met."""

    error: str
    """Name of its type."""
    message: str
    at_s: float
    """When, in seconds of the system clock."""

    @property
    def kind(self) -> type[QloraError] | None:
        """The type of an error of ours."""
        return ERRORS_BY_NAME.get(self.error)

    def order(self) -> tuple[bool, float]:
        """The least is what made the others fail: they meet a closed connection, which is no error of ours."""
        return self.kind is None, self.at_s


ALONE = Group()
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""For glibc: freed memory stays with a child until it ends. Giving it back and faulting it in again costs a training
step on a CPU a quarter of its time."""


def run_child(entry: str, spec: Record, folder: Path, report: Report, group: Group = ALONE) -> dict[str, Any]:
    """Call `entry` (`package.module:function`) with `spec` in a child process and return the record it made, as JSON.

    The function takes the spec as a JSON mapping and a `Report`. With several processes it runs once in each under
    torchrun, and only rank 0 reports and answers. With several nodes this is node 0; `python -m qlora_core.process
    join FOLDER` on the others, which must see the same folder, starts their part.

    Raises:
        QloraError: what the child raised, of the same type.
        ChildError: the child died without a result, or nothing says where nodes meet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in (folder / RESULT, *folder.glob(ERRORS)):
        left.unlink(missing_ok=True)
    write_atomically(folder / "spec.json", spec.model_dump_json())
    if group.nodes > 1:
        _invite(entry, folder, group, report)
    with (folder / "log.txt").open("ab") as log:
        logged_bytes = log.tell()
        child = subprocess.Popen(
            _command(entry, folder, group),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(group.processes),
        )
        try:
            while child.poll() is None:
                deliver(folder, report)
                time.sleep(POLL_S)
            deliver(folder, report)
        finally:
            _end_group(child)
    return _outcome(folder, child.returncode, logged_bytes)


def start_apart(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a program in a session of its own: a terminal's signals pass it by, and the end of this process ends it.

    Call it in the main thread: for the kernel, the thread that starts a process is its parent.
    """
    launch = [sys.executable, "-m", "qlora_core.process", "exec", str(os.getpid()), *command]
    return subprocess.Popen(launch, env=environment, start_new_session=True)


def deliver(folder: Path, report: Report) -> None:
    """Hand on the events that were written since the last call, each once, whole lines only."""
    events, mark = folder / "events.jsonl", folder / "delivered"
    if not events.is_file():
        return
    start = int(mark.read_text()) if mark.is_file() else 0
    with events.open("rb") as file:
        file.seek(start)
        block = file.read()
    whole = block[: block.rfind(b"\n") + 1]
    if not whole:
        return
    for line in whole.splitlines():
        report(EVENT.validate_json(line))
    write_atomically(mark, str(start + len(whole)))


def tail(path: Path, lines: int = LOG_LINES_IN_ERROR) -> str:
    """The last lines of a log, for an error message; empty if there is none."""
    if not path.is_file():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _command(entry: str, folder: Path, group: Group) -> Sequence[str]:
    if not group.is_launched:
        return [sys.executable, "-m", "qlora_core.process", "work", str(os.getpid()), entry, str(folder)]
    launch = ["-m", "qlora_core.process", "exec", str(os.getpid()), sys.executable, *_torchrun(entry, folder, group)]
    return [sys.executable, *launch]


def _torchrun(entry: str, folder: Path, group: Group) -> Sequence[str]:
    """Where nodes meet and which one this is comes from torchrun's own variables."""
    where = ["--nnodes", str(group.nodes)] if group.nodes > 1 else ["--standalone"]
    torchrun = ["-m", "torch.distributed.run", *where, "--nproc-per-node", str(group.processes)]
    return [*torchrun, "-m", "qlora_core.process", "work", LAUNCHER, entry, str(folder)]


def _invite(entry: str, folder: Path, group: Group, report: Report) -> None:
    """Leave what the other nodes need, and say what to type there."""
    if not os.environ.get(MASTER):
        raise ChildError(
            f"{group.nodes} nodes are to work together, and {MASTER} is not set; set it to this node's address as the "
            "others see it (and PET_MASTER_PORT to a free port, if 29500 is not)"
        )
    write_atomically(folder / "group.json", json.dumps({"entry": entry, "group": group.model_dump()}))
    port = os.environ.get("PET_MASTER_PORT", "29500")
    others = ", ".join(str(number) for number in range(1, group.nodes))
    report(
        Note(
            message=f"waiting for {group.nodes - 1} more node(s); on each, with PET_NODE_RANK = {others}: {MASTER}="
            f"{os.environ[MASTER]} PET_MASTER_PORT={port} PET_NODE_RANK=... python -m qlora_core.process join {folder}"
        )
    )


def _join(folder: Path) -> None:
    """Become torchrun on a further node of a group that was started elsewhere."""
    invitation = json.loads((folder / "group.json").read_text())
    group = Group.model_validate(invitation["group"])
    os.environ |= _environment(group.processes) | {LAUNCHER: str(os.getpid())}
    os.execv(sys.executable, [sys.executable, *_torchrun(invitation["entry"], folder, group)])


def _environment(processes: int) -> dict[str, str]:
    threads = max(1, usable_cpus() // processes)
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **offline, **KEEP_FREED_MEMORY, **os.environ}


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    """End the child's whole process group: politely first, then for good."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    child.wait(GRACE_S)


def _outcome(folder: Path, returncode: int, logged_bytes: int) -> dict[str, Any]:
    """The record of a group that has ended; `logged_bytes` is the size that its log had before."""
    log = folder / "log.txt"
    failures = [ChildFailure.model_validate_json(file.read_text()) for file in folder.glob(ERRORS)]
    first = min(failures, key=ChildFailure.order, default=None)
    if first is not None and first.kind is not None:
        raise first.kind(first.message)
    if first is None and (folder / RESULT).is_file():
        record: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return record
    if killed := KILLED_RANK.search(log.read_bytes()[logged_bytes:].decode(errors="replace")):
        raise _death(f"rank {killed[1]} of the child processes", -int(killed[2]), log)
    if first is not None:
        said = f"{first.error}: {first.message}"
        raise ChildError(f"the child process failed with {said}. The end of {log}:\n{tail(log)}")
    raise _death("the child process", returncode, log)


def _death(who: str, returncode: int, log: Path) -> ChildError:
    how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with code {returncode}"
    hint = "; SIGKILL often means that the machine ran out of memory" if returncode == -signal.SIGKILL else ""
    return ChildError(
        f"{who} {how} and left no result{hint}. The same command goes on from its last checkpoint. "
        f"The end of {log}:\n{tail(log)}"
    )


def die_with_parent(parent: str) -> None:
    """Ask the kernel to kill this process when its parent dies, and leave at once if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)


class _EventFile:
    """The child's end of events.jsonl; only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: Metrics | Progress | Note) -> None:
        self._file.write(event.model_dump_json() + "\n")


def _work(entry: str, folder: Path) -> int:
    """The child's main: call the entry and leave its record or its error behind."""
    from qlora_core.events import ignore

    rank = os.environ.get("RANK", "0")
    report: Report = _EventFile(folder / "events.jsonl") if rank == "0" else ignore
    module, _, function = entry.partition(":")
    try:
        spec = json.loads((folder / "spec.json").read_text())
        record: Record = getattr(importlib.import_module(module), function)(spec, report)
    except Exception as error:
        at_s = time.time()
        traceback.print_exc()
        failure = ChildFailure(error=type(error).__qualname__, message=str(error), at_s=at_s)
        write_atomically(folder / ERRORS.replace("*", rank), failure.model_dump_json())
        return 1
    if rank == "0":
        write_atomically(folder / RESULT, json.dumps(record.model_dump(mode="json")))
    return 0


def main(arguments: Sequence[str]) -> int:
    """What a child process is started with.

    `work PARENT ENTRY FOLDER` runs a stage; `exec PARENT COMMAND...` becomes a launcher that dies with its parent;
    `join FOLDER`, typed by a person, becomes the launcher of a further node.
    """
    verb, parent, *rest = arguments
    if verb == "join":
        _join(Path(parent))
    die_with_parent(os.environ[LAUNCHER] if parent == LAUNCHER else parent)
    if verb == "exec":
        os.environ[LAUNCHER] = str(os.getpid())  # the number stays when the program is replaced
        os.execv(rest[0], rest)
    return _work(rest[0], Path(rest[1]))


__all__ = ["ALONE", "Group", "deliver", "die_with_parent", "run_child", "start_apart", "tail"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
