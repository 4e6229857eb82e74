"""A process is told from all others: by restarts, containers and clocks, not by names."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tasks import processes
from tasks.processes import here, is_process, owner_is_alive, runs_here, this_process

SIGN = "from tasks.processes import this_process; import sys; print(this_process(), flush=True); sys.stdin.read()"


def signed_by(*before: str) -> "tuple[subprocess.Popen[str], str]":
    """A living process that has said who it is."""
    command = [*before, sys.executable, "-c", SIGN]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_process_is_known_by_number_and_start():
    mine = this_process()
    place, pid, ticks = mine.split(":")
    assert is_process(mine)
    assert runs_here(mine)
    assert owner_is_alive(mine)
    assert not owner_is_alive(f"{place}:{pid}:{int(ticks) - 1}")
    assert not owner_is_alive("")


def test_a_process_is_gone_as_soon_as_it_has_ended_even_while_its_parent_has_not_looked():
    process, owner = signed_by()
    assert owner_is_alive(owner)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not owner_is_alive(owner)
    process.communicate()
    assert not owner_is_alive(owner)


def test_a_step_of_the_clock_ends_no_living_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernel then says another time of its boot, and psutil another start of every process."""
    mine = this_process()
    (tmp_path / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    lines = Path("/proc/stat").read_text().splitlines()
    later = [f"btime {int(line.split()[1]) + 3600}" if line.startswith("btime") else line for line in lines]
    (tmp_path / "stat").write_text("\n".join(later))
    before_s = psutil.Process().create_time()
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert psutil.Process().create_time() > before_s + 3500
    assert owner_is_alive(mine)


def test_another_machine_of_the_same_name_is_another_machine(monkeypatch: pytest.MonkeyPatch):
    mine = this_process()
    twin = here().model_copy(update={"machine": "0" * 16, "boot": "00000000-0000-0000-0000-000000000000"})
    theirs = f"{twin}:{os.getpid()}:1"
    assert not runs_here(theirs)
    assert owner_is_alive(theirs)
    monkeypatch.setattr(processes, "here", lambda: twin)
    assert not runs_here(mine)
    assert owner_is_alive(mine)


def test_what_ran_before_this_machine_was_restarted_is_gone(monkeypatch: pytest.MonkeyPatch):
    place = here().model_copy(update={"machine": "a" * 16})
    monkeypatch.setattr(processes, "here", lambda: place)
    before = place.model_copy(update={"boot": "00000000-0000-0000-0000-000000000000"})
    owner = f"{before}:{os.getpid()}:{this_process().rpartition(':')[2]}"
    assert runs_here(owner)
    assert not owner_is_alive(owner)


def test_what_an_earlier_version_has_signed_counts_as_alive_elsewhere():
    owner = f"{socket.gethostname()}:{os.getpid()}:1.00"
    assert is_process(owner)
    assert not runs_here(owner)
    assert owner_is_alive(owner)


def test_what_is_no_process_is_none():
    for text in ("", "somebody", "a:b:c", f"{here()}:1", f"{here()}:1:1:1"):
        assert not is_process(text)


def may_unshare() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run(["unshare", "--pid", "--fork", "true"]).returncode


@pytest.mark.skipif(not may_unshare(), reason="needs the right to make a namespace of processes")
def test_a_process_of_another_container_of_this_machine_is_not_mistaken_for_one_of_the_same_number():
    process, owner = signed_by("unshare", "--pid", "--fork", "--mount-proc")
    try:
        assert owner.split(":")[1] == "1"
        assert not runs_here(owner)
        assert owner_is_alive(owner)
        assert owner.split("/")[1] == processes.UNKNOWN
    finally:
        process.communicate()
    asked = f"from tasks.processes import *; o = {this_process()!r}; print(runs_here(o), owner_is_alive(o))"
    inside = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", asked]
    assert subprocess.run(inside, capture_output=True, text=True).stdout.split() == ["False", "True"]
