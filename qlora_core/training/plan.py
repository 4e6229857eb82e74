"""Which rows each optimizer step trains on: a pure function of the seed, known to every process and after any crash."""

import heapq
from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

PADDED_TOKENS = 4096
"""What `micro_batch_size: auto` lets one forward pass of padded rows hold, padding included."""

GROUPED_STEPS = 50
"""Over how many steps `group_by_length` sorts rows."""


def plan_steps(
    rows: int,
    effective_batch_rows: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
    group_by: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """Row numbers of every optimizer step.

    Each epoch is a new permutation. Steps run over the border of an epoch, so every step but the last of training
    has exactly `effective_batch_rows` rows. With `group_by`, the rows' lengths `[rows]`, a step has rows of similar
    length.
    """
    total_rows = max(1, round(rows * epochs))
    epoch_orders = (_permutation(rows, seed, epoch) for epoch in range(ceil(total_rows / rows)))
    if group_by is not None:
        epoch_orders = (_grouped(order, group_by, effective_batch_rows, seed) for order in epoch_orders)
    order = np.concatenate(list(epoch_orders))[:total_rows]
    steps = [order[at : at + effective_batch_rows] for at in range(0, total_rows, effective_batch_rows)]
    return steps[:max_steps]


def micro_batches(
    step: NDArray[np.int64], lengths: NDArray[np.int64], micro_batch_size: int | str
) -> list[NDArray[np.int64]]:
    """Split a step's rows into forward passes of rows of similar length, longest first.

    Longest first, because a step that does not fit in memory should fail at its beginning.
    """
    ordered = step[np.argsort(-lengths[step], kind="stable")]
    if micro_batch_size == "auto":
        micro_batch_size = max(1, PADDED_TOKENS // int(lengths[ordered[0]]))
    size = int(micro_batch_size)
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def packed_micro_batches(
    step: NDArray[np.int64], lengths: NDArray[np.int64], micro_batch_size: int | str, capacity_tokens: int, shares: int
) -> list[NDArray[np.int64]]:
    """Split a step's rows into forward passes of about equally many tokens, for rows that are not padded.

    Args:
        step: row numbers.
        lengths: of all rows, in tokens.
        micro_batch_size: rows in a pass, or `auto` for as many as fit.
        capacity_tokens: most tokens of a pass under `auto`.
        shares: processes; under `auto` each gets equally many passes.
    """
    if micro_batch_size != "auto":
        return micro_batches(step, lengths, micro_batch_size)
    ordered = step[np.argsort(-lengths[step], kind="stable")]
    rounds = ceil(int(lengths[ordered].sum()) / capacity_tokens / shares)
    while True:
        parts = _spread(ordered, lengths, min(rounds * shares, len(ordered)))
        fits = max(int(lengths[part].sum()) for part in parts) <= capacity_tokens
        if fits or len(parts) == len(ordered):
            return parts
        rounds += ceil(rounds / 50)


def _spread(ordered: NDArray[np.int64], lengths: NDArray[np.int64], parts: int) -> list[NDArray[np.int64]]:
    """Longest row first, each to where fewest tokens are."""
    members: list[list[int]] = [[] for _ in range(parts)]
    fullness = [(0, number) for number in range(parts)]
    for row in ordered.tolist():
        tokens, number = heapq.heappop(fullness)
        members[number].append(row)
        heapq.heappush(fullness, (tokens + int(lengths[row]), number))
    return [np.array(rows, dtype=np.int64) for rows in members]


def share_of(batches: Sequence[NDArray[np.int64]], rank: int, processes: int) -> list[NDArray[np.int64]]:
    """The micro-batches of one process; all processes get equally many, some of them perhaps empty."""
    rounds = ceil(len(batches) / processes)
    nothing = np.zeros(0, np.int64)
    mine = list(batches[rank::processes])
    return mine + [nothing] * (rounds - len(mine))


def _grouped(order: NDArray[np.int64], lengths: NDArray[np.int64], batch_rows: int, seed: int) -> NDArray[np.int64]:
    """Sort stretches of many steps by length, then shuffle their steps, so that length follows no trend."""
    grouped = []
    for at in range(0, len(order), GROUPED_STEPS * batch_rows):
        stretch = order[at : at + GROUPED_STEPS * batch_rows]
        stretch = stretch[np.argsort(-lengths[stretch], kind="stable")]
        steps = [stretch[start : start + batch_rows] for start in range(0, len(stretch), batch_rows)]
        whole, rest = (steps, []) if len(steps[-1]) == batch_rows else (steps[:-1], steps[-1:])
        shuffled = np.random.default_rng((seed, int(order[0]), at)).permutation(len(whole))
        grouped += [whole[number] for number in shuffled] + rest
    return np.concatenate(grouped)


def _permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(rows)
