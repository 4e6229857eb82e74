"""Texts and character spans to token ids and loss masks, in one tokenization of the whole text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from qlora_core.data.template import Rendered


class Tokens(NamedTuple):
    """One row, both `[tokens]`; a mask of 1 means that predicting this token carries loss."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]


def tokenize(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Rendered]) -> list[Tokens]:
    """Ids and masks of rendered conversations; no special token is added, the template wrote them all."""
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch([row.text for row in rows], add_special_tokens=False)
    return [_tokens(encoding, row) for encoding, row in zip(encodings, rows, strict=True)]


def segments(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> list[dict[str, Any]]:
    """A row as text again, cut where training starts and stops: `[{text, trained}]`."""
    turns = np.flatnonzero(np.diff(tokens.mask)) + 1
    cuts = [0, *turns.tolist(), len(tokens.ids)]
    ends = [len(tokenizer.decode(tokens.ids[:cut])) for cut in cuts]
    text = tokenizer.decode(tokens.ids)
    return [
        {"text": text[ends[at] : ends[at + 1]], "trained": bool(tokens.mask[cuts[at]])} for at in range(len(cuts) - 1)
    ]


def _tokens(encoding: Any, row: Rendered) -> Tokens:
    ids = np.array(encoding.ids, dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    for start, end in row.spans:
        first, last = _token_at(encoding, range(start, end)), _token_at(encoding, range(end - 1, start - 1, -1))
        if first is None or last is None:
            continue
        if encoding.token_to_chars(first)[0] < start:
            first += 1  # it belongs to the prompt: a server would feed it, not generate it
        mask[first : last + 1] = 1
    return Tokens(ids, mask)


def _token_at(encoding: Any, characters: range) -> int | None:
    """The token of the first of these characters that has one; a tokenizer may drop characters."""
    for at in characters:
        token: int | None = encoding.char_to_token(at)
        if token is not None:
            return token
    return None
