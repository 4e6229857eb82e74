"""How well rows of different lengths fit into bins of one size."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def efficiency(lengths: Sequence[int], capacity: int) -> float:
    """Tokens over slots when rows are packed, longest first, each into the fullest bin with room; 0 for no rows.

    Rows of one length are counted together: the fullest bin with room for one takes as many as it can, and remains the
    fullest meanwhile. So the time does not grow with the number of rows.
    """
    counts = np.bincount(np.asarray(lengths, np.int64), minlength=1)
    rooms = np.zeros(capacity + 1, np.int64)  # bins by the tokens that they have room for
    bins = 0
    for length in range(len(counts) - 1, 0, -1):
        left = int(counts[length])
        if left == 0:
            continue
        for room in (length + np.flatnonzero(rooms[length:])).tolist():
            left = _fill(rooms, room, int(rooms[room]), length, left)
        full, rest = divmod(left, capacity // length)
        rooms[capacity - capacity // length * length] += full
        rooms[capacity - rest * length] += rest > 0
        bins += full + (rest > 0)
    return float(np.sum(lengths)) / (bins * capacity) if bins else 0.0


def _fill(rooms: NDArray[np.int64], room: int, bins: int, length: int, left: int) -> int:
    """Put rows of one length into bins of one room; return how many rows are left."""
    each = room // length
    full = min(bins, left // each)
    rest = min(left - full * each, each) if full < bins else 0
    rooms[room] -= full + (rest > 0)
    rooms[room - each * length] += full
    rooms[room - rest * length] += rest > 0
    return left - full * each - rest
