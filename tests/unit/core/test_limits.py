"""What a process may use of its machine; in real control groups where this user may make them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from qlora_core.limits import available_memory_bytes, usable_cpus, usable_memory_bytes

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
SAYS = "from qlora_core import limits; print(limits.{}())"


def asked(function: str, **more: object) -> int:
    command = [sys.executable, "-c", SAYS.format(function)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, **more).stdout)  # type: ignore[call-overload]


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group of version 1 below this process's own, for as long as the test."""
    controller: str = request.param
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    mine = next((path for _, controllers, path in lines if controllers == controller), None)
    if mine is None:
        pytest.skip(f"this machine has no {controller} control groups of version 1")
    folder = CGROUPS / controller / mine.lstrip("/") / f"qlora-test-{uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"this user may not make control groups: {error}")
    try:
        yield folder
    finally:
        folder.rmdir()


def joins(group: Path):  # type: ignore[no-untyped-def]
    return lambda: (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.mark.parametrize("group", ["cpu"], indirect=True)
def test_a_cpu_quota_of_a_real_control_group_limits_the_cpus(group: Path):
    (group / "cpu.cfs_period_us").write_text("100000")
    (group / "cpu.cfs_quota_us").write_text("70000")
    assert asked("usable_cpus", preexec_fn=joins(group)) == 1


@pytest.mark.parametrize("group", ["memory"], indirect=True)
def test_a_memory_limit_of_a_real_control_group_limits_the_memory(group: Path):
    (group / "memory.limit_in_bytes").write_text(str(GIB))
    assert asked("usable_memory_bytes", preexec_fn=joins(group)) == GIB
    assert 0 < asked("available_memory_bytes", preexec_fn=joins(group)) < GIB


@pytest.mark.parametrize("group", ["cpu"], indirect=True)
def test_children_get_no_more_threads_than_the_control_group_has_cpus(group: Path):
    (group / "cpu.cfs_quota_us").write_text("100000")
    program = "from qlora_core.process import _environment; print(_environment(1)['OMP_NUM_THREADS'])"
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=variables, preexec_fn=joins(group))
    assert said.stdout.strip() == "1"


def test_an_affinity_mask_limits_the_cpus():
    one = {min(os.sched_getaffinity(0))}
    assert asked("usable_cpus", preexec_fn=lambda: os.sched_setaffinity(0, one)) == 1


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_version_2_counts_the_limits_of_every_group_above(tmp_path: Path):
    root = written(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/cpu.max": "50000 100000",
            "sys/fs/cgroup/a/memory.max": str(GIB // 4),
            "sys/fs/cgroup/a/memory.current": str(GIB // 8),
            "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {GIB // 16}",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/b/memory.max": "max",
        },
    )
    assert usable_cpus(root) == 1
    assert usable_memory_bytes(root) == GIB // 4
    assert available_memory_bytes(root) == GIB // 4 - GIB // 8 + GIB // 16


def test_a_container_that_sees_its_own_group_as_the_top_finds_its_limits(tmp_path: Path):
    paths = {"proc/self/cgroup": "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123"}
    limits = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB // 4),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1024",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    root = written(tmp_path, paths | limits)
    assert usable_cpus(root) == 1
    assert usable_memory_bytes(root) == GIB // 4
    assert available_memory_bytes(root) == GIB // 4 - 1024


def test_a_kernel_without_control_groups_has_the_limits_of_the_machine(tmp_path: Path):
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert usable_memory_bytes(tmp_path) > GIB
