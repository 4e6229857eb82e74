"""Texts and character spans to token ids and loss masks, in one tokenization of the whole text."""

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from qlora_core.data.apart import Apart
from qlora_core.data.fast_bpe import Encoded, FastBpe
from qlora_core.data.template import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ASCII = frozenset({0})
COMPARED_ROWS = 2048
"""Every row of the first so many is tokenized by both tokenizers."""
COMPARED_EVERY_ROWS = 128
"""Of later ones, and every one that has a character of a kind that was not compared yet."""


class Tokens(NamedTuple):
    """One row, both `[tokens]`; a mask of 1 means that predicting this token carries loss."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]


class UnequalIdsError(Exception):
    """The fast tokenizer gave other ids than the reference for a text; what it made must not be used."""


class RowTokenizer:
    """Tokenizes rendered rows, with a faster tokenizer where its ids are the same. Close it, or use `with`.

    Args:
        tokenizer: the reference.
        fast: whether to look for a faster one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", fast: bool = True) -> None:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._reference = tokenizer
        twin = FastBpe.like(tokenizer) if fast else None
        self._fast = Apart(twin) if twin else None
        self._compared, self._kinds = 0, set[int]()
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End what was started for many rows."""
        if self._fast is not None:
            self._fast.close()

    @property
    def is_fast(self) -> bool:
        """Whether a faster tokenizer is used."""
        return self._fast is not None

    def __call__(self, rows: Sequence[Rendered]) -> list[Tokens]:
        """Ids and masks. A sample of the rows is tokenized by both tokenizers and compared.

        That the ids of all other rows are equal is likely and not proven. The sample: the first `COMPARED_ROWS`, then
        every `COMPARED_EVERY_ROWS`th, and every row with a character whose block of 128 has not been in it.

        Raises:
            UnequalIdsError: ids of a row of the sample differ.
        """
        if self._fast is None:
            return tokenize(self._reference, rows)
        encoded = self._fast.encode([row.text for row in rows])
        made = list(_split(encoded, _mask(encoded, rows)))
        left = np.flatnonzero(~encoded.exact).tolist()
        for at, tokens in zip(left, tokenize(self._reference, [rows[at] for at in left]), strict=True):
            made[at] = tokens
        sample = self._sample(rows)
        for at, tokens in zip(sample, tokenize(self._reference, [rows[at] for at in sample]), strict=True):
            if not np.array_equal(made[at].ids, tokens.ids):
                raise UnequalIdsError
        return made

    def _sample(self, rows: Sequence[Rendered]) -> list[int]:
        """Numbers of the rows to compare."""
        with self._lock:  # several threads tokenize
            first, self._compared = self._compared, self._compared + len(rows)
            chosen = [at for at in range(len(rows)) if first + at < COMPARED_ROWS or at % COMPARED_EVERY_ROWS == 0]
            known = set(chosen)
            for at, row in enumerate(rows):
                kinds = {ord(character) >> 7 for character in set(row.text)} if not row.text.isascii() else ASCII
                if at in known or not kinds <= self._kinds:
                    self._kinds |= kinds
                    known.add(at)
            return sorted(known)


def tokenize(tokenizer: "PreTrainedTokenizerFast", rows: Sequence[Rendered]) -> list[Tokens]:
    """Ids and masks of rendered conversations; no special token is added, the template wrote them all."""
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch([row.text for row in rows], add_special_tokens=False)
    return [_tokens(encoding, row) for encoding, row in zip(encodings, rows, strict=True)]


def segments(tokenizer: "PreTrainedTokenizerFast", tokens: Tokens) -> list[dict[str, Any]]:
    """A row as text again, cut where training starts and stops: `[{text, trained}]`."""
    turns = np.flatnonzero(np.diff(tokens.mask)) + 1
    cuts = [0, *turns.tolist(), len(tokens.ids)]
    ends = [len(tokenizer.decode(tokens.ids[:cut])) for cut in cuts]
    text = tokenizer.decode(tokens.ids)
    return [
        {"text": text[ends[at] : ends[at + 1]], "trained": bool(tokens.mask[cuts[at]])} for at in range(len(cuts) - 1)
    ]


def _split(encoded: Encoded, mask: NDArray[np.uint8]) -> Iterator[Tokens]:
    start = 0
    for count in encoded.counts.tolist():
        yield Tokens(encoded.ids[start : start + count], mask[start : start + count])
        start += count


def _mask(encoded: Encoded, rows: Sequence[Rendered]) -> NDArray[np.uint8]:
    """A token carries loss if it starts inside a span, `[tokens]`: one that starts before it belongs to the prompt."""
    first_tokens = np.cumsum(encoded.counts) - encoded.counts
    row_starts = np.append(encoded.starts, 0)[first_tokens].tolist()
    edges = [
        (start + _bytes_before(row.text, span[0]), start + _bytes_before(row.text, span[1]))
        for row, start, exact in zip(rows, row_starts, encoded.exact.tolist(), strict=True)
        if exact
        for span in row.spans
    ]
    places = np.searchsorted(encoded.starts, np.array(edges, np.int64).reshape(-1, 2))
    changes = np.zeros(len(encoded.ids) + 1, np.int32)
    np.add.at(changes, places[:, 0], 1)
    np.add.at(changes, places[:, 1], -1)
    return np.cumsum(changes[:-1]).astype(np.uint8)


def _bytes_before(text: str, character: int) -> int:
    return character if text.isascii() else len(text[:character].encode())


def _tokens(encoding: Any, row: Rendered) -> Tokens:
    ids = np.array(encoding.ids, dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    for start, end in row.spans:
        first, last = _token_at(encoding, range(start, end)), _token_at(encoding, range(end - 1, start - 1, -1))
        if first is None or last is None:
            continue
        if encoding.token_to_chars(first)[0] < start:
            first += 1  # it belongs to the prompt: a server would feed it, not generate it
        while last + 1 < len(ids) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
            last += 1  # one character may be several tokens
        mask[first : last + 1] = 1
    return Tokens(ids, mask)


def _token_at(encoding: Any, characters: range) -> int | None:
    """The token of the first of these characters that has one; a tokenizer may drop characters."""
    for at in characters:
        token: int | None = encoding.char_to_token(at)
        if token is not None:
            return token
    return None
