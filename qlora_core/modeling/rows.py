"""Prepared rows on disk: memory-mapped Arrow files of token ids and loss masks, shared by training and evaluation.

A prepared data set holds

    train.arrow, evaluation.arrow    row_id string, input_ids list<int32>, loss_mask list<uint8>
    prompts.arrow                    row_id, prompt string, prompt_ids list<int32>, expected string, messages string
    forgetting.arrow                 like train.arrow, windows of plain text with loss on every token
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

R = TypeVar("R")
BATCH_ROWS = 4096
TOKEN_SCHEMA = pa.schema(
    [("row_id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8()))]
)
PROMPT_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt", pa.string()),
        ("expected", pa.string()),
        ("messages", pa.string()),
    ]
)


class TokenRow(NamedTuple):
    """One row: ids and mask have the same length; a mask of 1 means that predicting this token carries loss."""

    row_id: str
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


class PromptRow(NamedTuple):
    """One evaluation row as a question: the rendered prompt up to the answer, and the answer that is expected."""

    row_id: str
    prompt_ids: list[int]
    prompt: str
    expected: str
    messages: str = "[]"
    """The prompt before rendering: a JSON list of chat messages."""


class TokenRows(Sequence[TokenRow]):
    """Random access to a file of token rows; memory holds the pages that are looked at.

    Counts of all rows are made once, when they are first asked for: 16 bytes a row.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            self._batches = [_Columns.of(reader.get_batch(at)) for at in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch.offsets) - 1 for batch in self._batches)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenRow:  # type: ignore[override]  # slices are not needed
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        batch, at = self._batches[number], index - self._starts[number]
        span = slice(batch.offsets[at], batch.offsets[at + 1])
        return TokenRow(batch.names[at].as_py(), batch.ids[span], batch.masks[span])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, shape `[rows]`; read-only."""
        return _concatenated([np.diff(batch.offsets) for batch in self._batches])

    @cached_property
    def trained_tokens(self) -> NDArray[np.int64]:
        """Tokens that carry loss in each row, `[rows]`, read-only; the first token of a row is never predicted."""
        sums = ((np.cumsum(batch.masks, dtype=np.int64), batch.offsets) for batch in self._batches)
        return _concatenated([np.diff(np.concatenate([[0], total])[offsets]) for total, offsets in sums])


class _Columns(NamedTuple):
    """One batch of a file."""

    names: pa.StringArray
    offsets: NDArray[np.int32]
    ids: NDArray[np.int32]
    masks: NDArray[np.uint8]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_Columns":
        names, ids, masks = (batch[field.name] for field in TOKEN_SCHEMA)
        return cls(names, ids.offsets.to_numpy(), ids.values.to_numpy(), masks.values.to_numpy())


def _concatenated(parts: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.int64]:
    whole = np.concatenate([np.zeros(0, np.int64), *parts], dtype=np.int64)
    whole.flags.writeable = False
    return whole


@contextmanager
def token_row_writer(path: Path) -> Iterator[Callable[[Sequence[TokenRow]], None]]:
    """Open a file of token rows; each call of what it yields appends a batch, so that memory holds only one.

    A mask on a row's first token is cleared, as nothing predicts it.
    """
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TOKEN_SCHEMA) as writer:
        yield lambda rows: writer.write(_token_batch(rows)) if rows else None


@contextmanager
def prompt_writer(path: Path) -> Iterator[Callable[[Sequence[PromptRow]], None]]:
    """The same for prompts."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, PROMPT_SCHEMA) as writer:
        yield lambda rows: writer.write(_prompt_batch(rows)) if rows else None


def write_token_rows(path: Path, rows: Iterable[TokenRow]) -> None:
    """Write rows in the order given."""
    with token_row_writer(path) as write:
        for batch in _batches(rows):
            write(batch)


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of the evaluation rows, in their order."""
    return [PromptRow(**row) for row in pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()]


def example_messages(dataset: Path) -> list[dict[str, str]]:
    """The chat messages of the first evaluation prompt, as an example of what the model is asked."""
    prompts = read_prompts(dataset / "prompts.arrow")
    messages: list[dict[str, str]] = json.loads(prompts[0].messages) if prompts else []
    return messages


def _token_batch(rows: Sequence[TokenRow]) -> pa.RecordBatch:
    lengths = np.array([len(row.input_ids) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([row.input_ids for row in rows], dtype=np.int32)
    masks = np.concatenate([row.loss_mask for row in rows], dtype=np.uint8)
    masks[offsets[:-1][lengths > 0]] = 0
    names = pa.array([row.row_id for row in rows], pa.string())
    columns = [names, pa.ListArray.from_arrays(offsets, ids), pa.ListArray.from_arrays(offsets, masks)]
    return pa.RecordBatch.from_arrays(columns, schema=TOKEN_SCHEMA)


def _prompt_batch(prompts: Sequence[PromptRow]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([prompt._asdict() for prompt in prompts], schema=PROMPT_SCHEMA)


def _batches(rows: Iterable[R]) -> Iterator[list[R]]:
    source = iter(rows)
    while batch := list(islice(source, BATCH_ROWS)):
        yield batch
