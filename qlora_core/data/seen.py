"""Which contents were met before, in 8 bytes a row."""

import numpy as np
from numpy.typing import NDArray

RECENT_KEYS = 2**17


class SeenKeys:
    """A growing set of keys, of which the first 8 bytes are kept: two different rows of 10 million meet by chance
    once in 370,000 such data sets.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def add(self, key: bytes) -> bool:
        """Remember a key; False if it was there already."""
        short = int.from_bytes(key[:8], "little")
        if short in self._recent or self._holds(short):
            return False
        self._recent.add(short)
        if len(self._recent) >= RECENT_KEYS:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]), kind="stable")
            self._recent.clear()
        return True

    def _holds(self, short: int) -> bool:
        at = self._sorted.searchsorted(np.uint64(short))
        return bool(at < len(self._sorted) and self._sorted[at] == short)
