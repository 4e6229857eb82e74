"""What this process may use of its machine: CPUs and memory, within the limits of its container.

`os.cpu_count` and psutil report the whole host. A container is limited by its control group: a CPU quota and a memory
limit, each also in every group above (version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html, version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/). A CPU quota is counted as that many CPUs, as Java and Go do.
"""

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import psutil

ROOT = Path("/")
UNLIMITED_BYTES = 2**60
"""Version 1 writes "no limit" as a number near 2^63."""


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may keep busy: its affinity mask, and the CPU quotas of its control groups.

    Args:
        root: where `/proc` and `/sys` are.
    """
    quotas = [quota for folder in _groups("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return min([len(os.sched_getaffinity(0)), *map(ceil, quotas)])


def usable_memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process and its neighbours in the container may have together."""
    limits = [limit for folder in _groups("memory", root) if (limit := _memory_limit(folder)) is not None]
    return min([int(psutil.virtual_memory().total), *limits])


def available_memory_bytes(root: Path = ROOT) -> int:
    """Memory that can be taken now, here and in every control group; file caches count as free."""
    left = [
        max(0, limit - _memory_used(folder))
        for folder in _groups("memory", root)
        if (limit := _memory_limit(folder)) is not None
    ]
    return min([int(psutil.virtual_memory().available), *left])


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group and of all above it that can be seen, nearest first.

    A container may see its own group as the top while `/proc` names it by its path on the host: that path does not
    exist here, and the top is the group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no control groups in this kernel
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for top in _tops(controllers, root):
            folder = top / path.lstrip("/")
            while folder != top and not folder.is_dir():
                folder = folder.parent
            yield folder
            while folder != top:
                folder = folder.parent
                yield folder


def _tops(controllers: str, root: Path) -> Iterator[Path]:
    """Where the controllers of a line of `/proc/self/cgroup` are mounted; version 2 names none."""
    mounted = root / "sys/fs/cgroup"
    names = {controllers, *controllers.split(",")} if controllers else {"", "unified"}
    yield from (mounted / name for name in sorted(names) if (mounted / name).is_dir())


def _cpu_quota(folder: Path) -> float | None:
    """CPUs that a group may use on average; None without a limit."""
    if (words := _read(folder / "cpu.max")) is not None:
        quota, period = words.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _memory_limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        limit = _number(folder / name)
        if limit is not None and limit < UNLIMITED_BYTES:
            return limit
    return None


def _memory_used(folder: Path) -> int:
    """Memory of a group in bytes, without file pages that the kernel gives back on demand."""
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    facts = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
    return used - int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says `max`."""
    words = _read(file)
    return int(words) if words is not None and words != "max" else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
