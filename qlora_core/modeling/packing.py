"""Put rows of different lengths into bins of one size."""

from collections.abc import Sequence

import numpy as np


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
    """Tokens over slots when the rows are packed; 0 for no rows."""
    bins = best_fit_decreasing(lengths, capacity)
    return float(np.sum(lengths)) / (len(bins) * capacity) if bins else 0.0
