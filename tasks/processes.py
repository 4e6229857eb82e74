"""Which process a run belongs to, and whether that process still runs.

A process is named by what no other one shares, whatever the clock says and whatever machines are called:

    host/machine/boot/namespace:pid:ticks

    host        its name, for people
    machine     a digest of /etc/machine-id; `-` in a container, where an image may bring it along
    boot        the boot id of the kernel
    namespace   of process numbers: containers of one kernel count for themselves
    ticks       when the process started, in clock ticks since the boot

Earlier versions wrote `host:pid:seconds`. Nothing follows from that: another machine may bear the name, and the clock
may have been set. Such a process is taken to be alive elsewhere.
"""

import hashlib
import os
import re
import socket
from pathlib import Path

from qlora_core.artifacts import Record

UNKNOWN = "-"
INITIAL_NAMESPACE = "4026531836"
"""Of process numbers, outside of containers; the kernel's PROC_PID_INIT_INO."""
MACHINE_ID = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
OWNER = re.compile(r"([^:/]*)/([0-9a-f]+|-)/([0-9a-f-]+)/(\d+|-):(\d+):(\d+)")
EARLIER = re.compile(r"[^:]+:\d+:\d+\.\d\d")


class Place(Record):
    """Where processes have numbers of their own."""

    host: str
    machine: str
    boot: str
    namespace: str

    def __str__(self) -> str:
        return f"{self.host}/{self.machine}/{self.boot}/{self.namespace}"


def here() -> Place:
    """Where this process runs."""
    namespace = _namespace()
    return Place(
        host=re.sub("[:/]", "_", socket.gethostname()),
        machine=_machine() if namespace == INITIAL_NAMESPACE else UNKNOWN,
        boot=_text(BOOT_ID) or UNKNOWN,
        namespace=namespace,
    )


def this_process() -> str:
    """What identifies this process until it ends, even when its number is used again."""
    return f"{here()}:{os.getpid()}:{_start_ticks(os.getpid()) or 0}"


def is_process(owner: str) -> bool:
    """Whether a text names a process as `this_process` does, or did in earlier versions."""
    return OWNER.fullmatch(owner) is not None or EARLIER.fullmatch(owner) is not None


def owner_is_alive(owner: str) -> bool:
    """Whether the process that owns a run still runs; one that cannot be seen from here is taken to."""
    place = here()
    if not _is_seen_from(place, owner):
        return bool(owner)
    found = OWNER.fullmatch(owner)
    return found is not None and found[3] == place.boot and _start_ticks(int(found[5])) == int(found[6])


def runs_here(owner: str) -> bool:
    """Whether this machine can tell if the process that owns a run still runs."""
    return _is_seen_from(here(), owner)


def _is_seen_from(place: Place, owner: str) -> bool:
    """True for processes with numbers of this place, and for those of this very machine before it was restarted."""
    found = OWNER.fullmatch(owner)
    if found is None or UNKNOWN in (place.boot, place.namespace):
        return False
    host, machine, boot, namespace = found.groups()[:4]
    if boot == place.boot:
        return namespace == place.namespace
    return machine == place.machine != UNKNOWN and host == place.host


def _start_ticks(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if there is none, or if it is only waited for.

    Field 22 of proc(5), counted behind the name, which may hold spaces and brackets.
    """
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if not fields or fields[0] in "ZX":
        return None
    return int(fields[19])


def _namespace() -> str:
    try:
        return re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink())) or UNKNOWN
    except OSError:
        return UNKNOWN


def _machine() -> str:
    """A digest, as systemd asks for: the id itself is nobody else's business."""
    known = next((text for file in MACHINE_ID if (text := _text(file))), "")
    return hashlib.sha256(f"qlora-flows {known}".encode()).hexdigest()[:16] if known else UNKNOWN


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
