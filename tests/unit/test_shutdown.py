"""How a command ends when it is told to: real processes, real signals, a real terminal."""

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

PROGRAM = """
import signal, sys, time
from flows.shutdown import Shutdown
shutdown = Shutdown(deadline_s={deadline_s})
shutdown.listen()
{before}
sys.argv = ["qlora", "run", "my recipe.yaml"]
try:
    try:
        print("working", flush=True)
        time.sleep(120)
    finally:
        print("ending", flush=True)
        time.sleep({ending_s})
        print("ended", flush=True)
except BaseException as error:
    if not shutdown.number:
        raise
    shutdown.explain()
    sys.exit(shutdown.exit_code)
"""
RESUMABLE = "shutdown.end_within_deadline()"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@contextmanager
def working(before=RESUMABLE, ending_s=0.0, deadline_s=60.0, **popen):
    program = PROGRAM.format(before=before, ending_s=ending_s, deadline_s=deadline_s)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | popen
    process = subprocess.Popen([sys.executable, "-c", program], **output)
    try:
        if process.stdout:
            assert process.stdout.readline() == "working\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_a_command_in_order_with_its_code_and_says_what_to_type(number):
    with working() as process:
        process.send_signal(number)
        output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (CODES[number], "ending\nended\n")
    assert "finished stages and the newest checkpoint are kept" in said
    assert "run 'my recipe.yaml'" in said


@pytest.mark.parametrize("second", CODES)
def test_a_second_signal_does_not_break_off_what_the_first_began(second):
    with working(ending_s=2) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(second)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "ended\n")


def test_what_does_not_end_in_order_is_given_up_at_its_deadline():
    with working(ending_s=300, deadline_s=0.5) as process:
        process.send_signal(signal.SIGTERM)
        output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (143, "ending\n")
    assert "it did not end in order within 0 s" in said
    assert "run 'my recipe.yaml'" in said


def test_a_command_whose_python_code_gets_no_turn_ends_at_its_deadline_too():
    stuck = "import ctypes; print('working', flush=True); ctypes.CDLL(None).sleep(30)"
    with working(before=f"{RESUMABLE}; {stuck}", deadline_s=0.5) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143


def test_a_command_that_cannot_be_resumed_hears_every_ctrl_c():
    with working(before="", ending_s=100) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_a_signal_that_was_switched_off_before_stays_so():
    with working(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:  # as nohup does
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 143


def test_a_terminal_that_is_gone_does_not_turn_the_end_into_an_error(tmp_path):
    keys, tty = pty.openpty()
    mark = f"open({str(tmp_path / 'said')!r}, 'w').write('yes')"
    with working(before=f"{RESUMABLE}; {mark}", stdout=tty, stderr=tty, stdin=tty, start_new_session=True) as process:
        os.close(tty)
        while not (tmp_path / "said").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.close(keys)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 129
