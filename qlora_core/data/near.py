"""Rows that say almost what another row says, found by MinHash (Broder 1997) in bands of locality-sensitive hashes.

A row is near another when all 16 values of one of its 4 bands are equal: 90 % of the pairs that share 95 % of their
words are found, 11 % of those that share 80 %, none of those that share half. Only the bands' hashes are kept, 32 bytes
a row.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash  # type: ignore[import-untyped]

from qlora_core.data.candidates import Candidate
from qlora_core.data.reasons import RowProblem
from qlora_core.data.summary import Tally

BANDS, BAND_VALUES = 4, 16
SEED = 1
CHUNK_ROWS = 2048
RECENT_KEYS = 2**18
MIX = np.random.default_rng(SEED).integers(2**63, size=BAND_VALUES, dtype=np.uint64) * 2 + 1
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana and Han, which are written without spaces between words."""

Policy = Literal["report", "drop", "ignore"]


def sift(candidates: Iterable[Candidate], policy: Policy, tally: Tally) -> Iterator[Candidate]:
    """Count rows that are near an earlier one of their own side, or of the other; drop them if the policy says so."""
    source, seen = iter(candidates), (_Keys(), _Keys())
    while policy != "ignore" and (chunk := list(islice(source, CHUNK_ROWS))):
        evaluation = np.array([candidate.evaluation for candidate in chunk])
        near = _look(band_keys([candidate.said for candidate in chunk]), evaluation, seen)
        for candidate, twin, leak in zip(chunk, *near, strict=True):
            if not (twin or leak):
                yield candidate
                continue
            code = "near_leak" if leak else "near_duplicate"
            problem = RowProblem(code, "almost the same words came before")
            if policy == "drop":
                tally.drop(problem, candidate.file, candidate.row)
            else:
                tally.notice(problem, candidate.file, candidate.row)
                yield candidate
    yield from source


def band_keys(texts: Sequence[str]) -> NDArray[np.uint64]:
    """A hash for each band of each text, `[texts, bands]`."""
    digests = RMinHash.digests_from_token_sets([_words(text) for text in texts], BANDS * BAND_VALUES, SEED)
    values = np.array(digests, np.uint64).reshape(len(texts), BANDS, BAND_VALUES)
    keys: NDArray[np.uint64] = (values * MIX).sum(-1, dtype=np.uint64)
    return keys


def _words(text: str) -> list[str]:
    """Words; pairs of characters where words are not divided by spaces."""
    if text.isascii() or not UNSPACED.search(text):
        return text.split()
    return [text[at : at + 2] for at in range(max(1, len(text) - 1))]


class _Keys:
    """The keys of one side, sorted, band by band."""

    def __init__(self) -> None:
        empty = np.zeros(0, np.uint64)
        self._recent, self._old = [empty] * BANDS, [empty] * BANDS

    def hold(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether some band of each row is known, `[rows]`."""
        found = np.zeros(len(keys), bool)
        for band in range(BANDS):
            for known in (self._recent[band], self._old[band]):
                found |= _places(known, keys[:, band])[1]
        return found

    def add(self, keys: NDArray[np.uint64]) -> None:
        """Remember rows."""
        for band in range(BANDS):
            self._recent[band] = np.sort(np.concatenate([self._recent[band], keys[:, band]]))
            if len(self._recent[band]) >= RECENT_KEYS:
                self._old[band] = np.sort(np.concatenate([self._old[band], self._recent[band]]), kind="stable")
                self._recent[band] = np.zeros(0, np.uint64)


def _look(
    keys: NDArray[np.uint64], evaluation: NDArray[np.bool_], seen: tuple[_Keys, _Keys]
) -> tuple[list[bool], list[bool]]:
    """Whether each row is near an earlier one of its own side, and of the other side."""
    near = []
    for side in (0, 1):
        members = np.flatnonzero(evaluation == side)
        near.append(seen[side].hold(keys) | _earlier(keys, members))
        seen[side].add(keys[members])
    own = np.where(evaluation, near[1], near[0])
    other = np.where(evaluation, near[0], near[1])
    return own.tolist(), other.tolist()


def _earlier(keys: NDArray[np.uint64], members: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a member that stands before a row shares a band with it, `[rows]`."""
    found = np.zeros(len(keys), bool)
    for band in range(BANDS):
        values, first = np.unique(keys[members, band], return_index=True)
        at, known = _places(values, keys[:, band])
        found[known] |= members[first[at[known]]] < np.flatnonzero(known)
    return found


def _places(known: NDArray[np.uint64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each key stands in sorted ones, and whether it does."""
    at = np.searchsorted(known, keys)
    inside = at < len(known)
    inside[inside] = known[at[inside]] == keys[inside]
    return at, inside
