"""How sure a score is: the paired bootstrap over rows (Efron 1979; for paired systems Koehn 2004).

A score is a function of sums over rows: the loss is total nats over total tokens, a share is rows that are right over
rows, BLEU is made of n-gram counts. Drawing rows again with replacement only changes how often each row counts in
those sums, so thousands of draws are one matrix product. Both models are given the same draws: rows that are hard for
both then cancel out of the difference.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_core.artifacts import Interval

DRAWS = 2000
CONFIDENCE = 0.95
SEED = 20_260_101
CHUNK_COUNTS = 4_000_000
"""How many draw counts are in memory at once."""

Array = NDArray[np.float64]


class RowSums(NamedTuple):
    """One score of one model: what each row adds to its sums, and the score that the sums give."""

    rows: Array
    """`[rows, sums]`"""
    combine: Callable[[Array], Array]
    """Sums `[draws, sums]` to scores `[draws]`."""

    @property
    def score(self) -> float:
        """The score on all rows, each counted once."""
        return float(self.combine(self.rows.sum(axis=0, keepdims=True))[0])


def mean_of(values: list[float]) -> RowSums:
    """The plain mean over rows."""
    return RowSums(np.column_stack([values, np.ones(len(values))]).astype(np.float64), ratio)


def ratio(sums: Array) -> Array:
    """First sum over second: a mean weighted by the second."""
    quotients: Array = np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] != 0)
    return quotients


def exp_ratio(sums: Array) -> Array:
    """Perplexity from nats and tokens."""
    with np.errstate(over="ignore"):
        exponentials: Array = np.exp(ratio(sums))
    return exponentials


def interval_of_difference(candidate: RowSums, other: RowSums) -> Interval:
    """Where `candidate - other` lies with 95 % confidence; both must be of the same rows in the same order."""
    ours, theirs = _draw(candidate, other)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ours - theirs, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))


def _draw(*scores: RowSums) -> list[Array]:
    """The scores `[draws]` of every model on the same random draws of rows."""
    random, rows = np.random.default_rng(SEED), len(scores[0].rows)
    chunk = max(1, CHUNK_COUNTS // rows)
    drawn: list[list[Array]] = [[] for _ in scores]
    for start in range(0, DRAWS, chunk):
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=min(chunk, DRAWS - start)).astype(np.float64)
        for mine, score in zip(drawn, scores, strict=True):
            mine.append(score.combine(counts @ score.rows))
    return [np.concatenate(mine) for mine in drawn]
