"""Put rows of different lengths into bins of one size."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the rows in each bin: longest first, each into the fullest bin that still has room.

    Equal lengths keep their order. The bins with a given room are found through a bit set of rooms, so the time is
    proportional to rows times capacity / 64.

    Raises:
        ValueError: a row is longer than a bin.
    """
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(f"a row has {max(lengths)} tokens; a bin holds {capacity}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some bin has room for exactly r more tokens
    for row in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(row)
        by_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return bins


def efficiency(lengths: Sequence[int], capacity: int) -> float:
    """Tokens over slots when the rows are packed by `best_fit_decreasing`; 0 for no rows.

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
