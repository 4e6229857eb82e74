import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qlora_core.errors import ChildError, TrainingError
from qlora_core.events import Metrics, Note, ignore
from qlora_core.process import deliver, run_child
from tests.unit.core.child import Answer

ENTRY = "tests.unit.core.child:"


def run(function: str, folder: Path, report=ignore, processes: int = 1):
    return run_child(ENTRY + function, Answer(value=21), folder, report, processes=processes)


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
        "from tests.unit.core.child import Answer; from qlora_core.process import run_child; from pathlib import Path; "
        f"run_child('{ENTRY}linger', Answer(value=1), Path({str(tmp_path)!r}), print, processes={processes})"
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
    assert run("rank", tmp_path, events.append, processes=2) == {"value": 2}
    assert events == [Note(message="rank 0 of 2")]
