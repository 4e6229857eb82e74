"""A process that gets no memory any more."""

import os
import resource
import signal
import time

import pytest

from tasks.starving import ends_when_starved

NO_MEMORY_BYTES = 1 << 20
LONGEST_S = 30


def outcome(work) -> int:
    """How a forked process ends that does some work; the number of a signal is negative."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(3)
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("it hangs")


def starve(soft: int = NO_MEMORY_BYTES) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


def test_one_that_waits_for_ever_is_killed():
    def wait_for_ever() -> None:
        with ends_when_starved(every_s=0.1):
            starve()
            time.sleep(LONGEST_S)

    assert outcome(wait_for_ever) == -signal.SIGKILL


def test_one_that_gets_memory_again_goes_on_and_so_does_one_whose_block_has_ended():
    def starve_for_a_moment() -> None:
        with ends_when_starved(every_s=0.2):
            starve()
            time.sleep(0.3)
            starve(resource.RLIM_INFINITY)
            time.sleep(1)
        starve()
        time.sleep(1)
        os._exit(0)

    assert outcome(starve_for_a_moment) == 0
