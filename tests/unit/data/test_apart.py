import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qlora_core.data import apart
from qlora_core.data.apart import PROGRAM, Apart
from qlora_core.data.fast_bpe import HARD_TEXTS, FastBpe


@pytest.fixture
def fast(chatml, monkeypatch):
    monkeypatch.setattr(apart, "TEXTS_HERE", 1)
    twin = FastBpe.like(chatml)
    assert twin is not None
    return twin


def assert_equal(made, expected) -> None:
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.tolist() == theirs.tolist()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if PROGRAM in child.cmdline()]


def test_another_process_gives_the_same_ids_and_places_and_is_gone_afterwards(fast):
    encoder = Apart(fast)
    assert_equal(encoder.encode(HARD_TEXTS[:1]), fast.encode(HARD_TEXTS[:1]))
    assert children() == []
    for _ in range(2):
        assert_equal(encoder.encode(HARD_TEXTS), fast.encode(HARD_TEXTS))
        assert len(children()) == 1
    encoder.close()
    assert children() == []


def test_texts_of_a_process_that_was_killed_are_encoded_all_the_same(fast):
    encoder = Apart(fast)
    encoder.encode(HARD_TEXTS)
    (child,) = children()
    child.kill()
    assert_equal(encoder.encode(HARD_TEXTS), fast.encode(HARD_TEXTS))
    assert_equal(encoder.encode(HARD_TEXTS), fast.encode(HARD_TEXTS))
    encoder.close()
    assert children() == []


def test_the_process_ends_when_its_parent_is_killed():
    parent = (
        "import sys, time; from subprocess import PIPE, Popen; "
        f"child = Popen([sys.executable, '-c', {PROGRAM!r}], stdin=PIPE, stdout=PIPE); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        child = psutil.Process(int(started.stdout.readline()))
        os.kill(started.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
