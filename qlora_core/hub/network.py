"""Whether servers may be asked at all, and how to ask again while their troubles look temporary."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from qlora_core.errors import SourceUnavailableError

ATTEMPTS = 5
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
T = TypeVar("T")


class BusyError(Exception):
    """The server said that it is busy, or broke off; `wait_s` is what it asked for."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids asking any server; huggingface_hub and transformers obey the same switch."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def patiently(call: Callable[[], T], what: str) -> T:
    """The call's answer, asking again ever more slowly while it raises `BusyError`.

    Raises:
        SourceUnavailableError: it was busy too often.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except BusyError as busy:
            if attempt == ATTEMPTS - 1:
                raise SourceUnavailableError(f"{what}: {busy}; try again later") from busy
            time.sleep(min(LONGEST_WAIT_S, max(busy.wait_s, FIRST_WAIT_S * 2**attempt)))
    raise AssertionError("the last attempt either returns or raises")
