"""Prepared rows on disk: memory-mapped Arrow files of token ids and loss masks, shared by training and evaluation.

A prepared data set holds

    train.arrow, evaluation.arrow    row_id string, input_ids list<int32>, loss_mask list<uint8>
    prompts.arrow                    row_id, prompt string, prompt_ids list<int32>, expected string, messages string
    forgetting.arrow                 like train.arrow, windows of plain text with loss on every token
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

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
    """Random access to a file of token rows without reading it into memory."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        self._ids, self._masks, self._names = (_single(table, c) for c in ("input_ids", "loss_mask", "row_id"))
        self._offsets = self._ids.offsets.to_numpy() if len(table) else np.zeros(1, np.int32)
        self._flat_ids = self._ids.values.to_numpy() if len(table) else np.zeros(0, np.int32)
        self._flat_masks = self._masks.values.to_numpy() if len(table) else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> TokenRow:  # type: ignore[override]  # slices are not needed
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        span = slice(self._offsets[index], self._offsets[index + 1])
        return TokenRow(self._names[index].as_py(), self._flat_ids[span], self._flat_masks[span])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, shape `[rows]`."""
        lengths: NDArray[np.int64] = np.diff(self._offsets).astype(np.int64)
        return lengths

    @property
    def trained_tokens(self) -> NDArray[np.int64]:
        """Tokens that carry loss in each row, shape `[rows]`; the first token of a row is never predicted."""
        sums = np.concatenate([[0], np.cumsum(self._flat_masks, dtype=np.int64)])
        trained: NDArray[np.int64] = sums[self._offsets[1:]] - sums[self._offsets[:-1]]
        return trained


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


def write_prompts(path: Path, prompts: Iterable[PromptRow]) -> None:
    """Write prompts in the order given."""
    with prompt_writer(path) as write:
        for batch in _batches(prompts):
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


def _single(table: pa.Table, column: str) -> pa.Array:
    chunked = table[column]
    return chunked.chunk(0) if chunked.num_chunks else pa.array([], type=chunked.type)
