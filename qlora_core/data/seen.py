"""Which contents were met before, in 8 bytes a row."""

from array import array
from bisect import bisect_left

import numpy as np

RECENT_KEYS = 2**17


class SeenKeys:
    """A growing set of keys, of which the first 8 bytes are kept: two different rows of 10 million meet by chance
    once in 370,000 such data sets.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = array("Q")

    def add(self, key: bytes) -> bool:
        """Remember a key; False if it was there already."""
        short = int.from_bytes(key[:8], "little")
        if short in self._recent or self._holds(short):
            return False
        self._recent.add(short)
        if len(self._recent) >= RECENT_KEYS:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            merged = np.sort(np.concatenate([np.frombuffer(self._sorted, np.uint64), recent]), kind="stable")
            self._sorted = array("Q", merged.tobytes())
            self._recent.clear()
        return True

    def __contains__(self, key: bytes) -> bool:
        short = int.from_bytes(key[:8], "little")
        return short in self._recent or self._holds(short)

    def _holds(self, short: int) -> bool:
        """By `bisect`: NumPy would hand the interpreter over to the tokenizer's threads at every single row."""
        at = bisect_left(self._sorted, short)
        return at < len(self._sorted) and self._sorted[at] == short
