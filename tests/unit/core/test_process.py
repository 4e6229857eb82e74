import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qlora_core.errors import ChildError, TrainingError
from qlora_core.events import Metrics, Note, ignore
from qlora_core.process import ALONE, Group, deliver, run_child
from tests.unit.core.child import Answer

ENTRY = "tests.unit.core.child:"


def run(function: str, folder: Path, report=ignore, group: Group = ALONE):
    return run_child(ENTRY + function, Answer(value=21), folder, report, group)


def test_a_child_reports_in_order_and_answers(tmp_path):
    events = []
    assert run("double", tmp_path, events.append) == {"value": 42}
    assert [event.step for event in events if isinstance(event, Metrics)] == [1, 2, 3]
    assert events[0] == Note(message="here")
    assert "noise on standard output" in (tmp_path / "log.txt").read_text()


def test_events_are_delivered_once_also_over_several_attempts(tmp_path):
    events = []
    run("double", tmp_path, events.append)
    deliver(tmp_path, events.append)
    assert sum(isinstance(event, Metrics) for event in events) == 3


def test_half_a_line_waits_for_its_end(tmp_path):
    events = []
    whole = Note(message="whole").model_dump_json() + "\n"
    (tmp_path / "events.jsonl").write_text(whole + '{"event": "no')
    deliver(tmp_path, events.append)
    assert events == [Note(message="whole")]


def test_an_error_of_ours_keeps_its_type_and_message(tmp_path):
    with pytest.raises(TrainingError, match="the rank is wrong"):
        run("fail", tmp_path)


def test_another_error_names_its_type_and_shows_the_log(tmp_path):
    with pytest.raises(ChildError, match=r"ZeroDivisionError: never mind(?s:.*)Traceback"):
        run("crash", tmp_path)


def test_a_killed_child_is_told_apart(tmp_path):
    with pytest.raises(ChildError, match=r"killed by SIGKILL.*out of memory"):
        run("die", tmp_path)


def test_leaving_the_call_ends_the_child(tmp_path):
    pids: list[int] = []

    def leave(event):
        pids.append(int(event.message))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("linger", tmp_path, leave)
    assert not psutil.pid_exists(pids[0])


@pytest.mark.parametrize("processes", [1, 2])
def test_no_child_outlives_a_killed_parent(tmp_path, processes):
    program = (
        "from tests.unit.core.child import Answer; from qlora_core.process import Group, run_child; "
        "from pathlib import Path; "
        f"run_child('{ENTRY}linger', Answer(value=1), Path({str(tmp_path)!r}), print, Group(processes={processes}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(90, parent.kill)
    timer.start()
    line = parent.stdout.readline()
    timer.cancel()
    child = psutil.Process(int("".join(c for c in line.split("message=")[1] if c.isdigit())))
    group = [child, *psutil.Process(parent.pid).children(recursive=True)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 15
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in group):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.05)


def test_of_several_processes_only_rank_zero_reports(tmp_path):
    events = []
    assert run("rank", tmp_path, events.append, Group(processes=2)) == {"value": 2}
    assert events == [Note(message="rank 0 of 2")]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        ("one_rank_fails", TrainingError, "^loss is nan at step 7$"),
        ("one_rank_crashes", ChildError, "ZeroDivisionError: rows / 0"),
        ("one_rank_fails_late", TrainingError, "^cannot write the last file$"),
    ],
)
def test_of_several_processes_the_first_error_is_the_one_that_is_told(tmp_path, function, kind, said, rank):
    with pytest.raises(kind, match=said) as caught:
        run_child(ENTRY + function, Answer(value=rank), tmp_path, ignore, Group(processes=2))
    assert type(caught.value) is kind


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_one_that_was_killed_is_named(tmp_path, rank):
    with pytest.raises(ChildError, match=f"rank {rank} .*killed by SIGKILL.*out of memory"):
        run_child(ENTRY + "one_rank_dies", Answer(value=rank), tmp_path, ignore, Group(processes=2))


def test_a_result_counts_although_its_process_ended_badly(tmp_path):
    assert run("ends_badly", tmp_path) == {"value": 21}


def test_an_error_of_an_earlier_attempt_is_forgotten(tmp_path):
    with pytest.raises(TrainingError):
        run("fail", tmp_path)
    assert run("double", tmp_path) == {"value": 42}


def test_a_second_node_joins_by_what_the_first_one_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PET_MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("PET_MASTER_PORT", str(free_port()))
    events, joined = [], []

    def report(event):
        events.append(event)
        if "waiting for 1 more node(s)" in event.message:
            command = event.message.partition("PET_NODE_RANK=... ")[2].split()
            environment = {**os.environ, "PET_NODE_RANK": "1"}
            joined.append(subprocess.Popen([sys.executable, *command[1:]], env=environment))

    assert run("rank", tmp_path, report, Group(processes=1, nodes=2)) == {"value": 2}
    assert events[-1] == Note(message="rank 0 of 2")
    assert joined[0].wait(60) == 0


def test_nodes_need_a_place_to_meet(tmp_path, monkeypatch):
    monkeypatch.delenv("PET_MASTER_ADDR", raising=False)
    with pytest.raises(ChildError, match="set it to this node's address"):
        run("rank", tmp_path, group=Group(nodes=2))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


APART = (
    "import os, sys, time; from qlora_core.process import start_apart; "
    "child = start_apart([sys.executable, '-c', 'import time; print(7, flush=True); time.sleep(100)'], os.environ); "
    "print(child.pid, flush=True); time.sleep(100)"
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_is_started_apart_hears_no_ctrl_c_but_ends_with_its_parent(number):
    parent = subprocess.Popen([sys.executable, "-c", APART], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = {parent.stdout.readline().strip() for _ in range(2)}
        (pid,) = said - {"7"}
        child = psutil.Process(int(pid))
        assert os.getpgid(child.pid) != os.getpgid(parent.pid)
        assert os.getsid(child.pid) != os.getsid(parent.pid)
        parent.send_signal(number)
        parent.wait(60)
        psutil.wait_procs([child], timeout=30)
        assert not child.is_running()
    finally:
        parent.kill()
        parent.communicate()
