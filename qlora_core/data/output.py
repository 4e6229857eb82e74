"""Write the rows that are kept, batch by batch, and remember what the summary needs."""

from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa

from qlora_core.data.reasons import RowProblem
from qlora_core.data.reuse import KEYS_FILE, keys_schema
from qlora_core.data.summary import Tally
from qlora_core.data.tokenize import Tokens
from qlora_core.modeling.rows import PromptRow, TokenRow, prompt_writer, token_row_writer

PREVIEW_ROWS = 3
NO_KEY = bytes(16)
"""Of a row that was cut: it is cut again from the whole row."""


class Finished(NamedTuple):
    """A tokenized row."""

    file: str
    row: int
    key: bytes
    evaluation: bool
    tokens: Tokens
    prompt: PromptRow | None
    reused: bool
    cut: str = ""
    """What was cut, if the row was too long."""
    part: int = 0
    """Counted from 1 where a row became several."""
    copies: int = 1
    """How often it is trained on."""

    @property
    def row_id(self) -> str:
        """`file:row`, which identifies the row for people; `file:row#part` for a part of one."""
        return f"{self.file}:{self.row}" + (f"#{self.part}" if self.part else "")


class Side:
    """What is known of the training or of the evaluation rows."""

    def __init__(self) -> None:
        self.lengths = array("i")
        """Tokens of each row."""
        self.trained_tokens = 0

    def add(self, tokens: Tokens) -> None:
        """Count one row; the first token of a row is never predicted."""
        self.lengths.append(len(tokens.ids))
        self.trained_tokens += int(np.count_nonzero(tokens.mask[1:]))


class Output:
    """The files of a prepared data set in the making. Use it in a `with` statement."""

    def __init__(self, into: Path, seq_len_tokens: int, way: str, tally: Tally) -> None:
        self._seq_len_tokens, self._tally = seq_len_tokens, tally
        self._stack = ExitStack()
        open_ = self._stack.enter_context
        self._write_train = open_(token_row_writer(into / "train.arrow"))
        self._write_evaluation = open_(token_row_writer(into / "evaluation.arrow"))
        self._write_prompts = open_(prompt_writer(into / "prompts.arrow"))
        self._keys_schema = keys_schema(way)
        self._keys = open_(pa.ipc.new_file(open_(pa.OSFile(str(into / KEYS_FILE), "wb")), self._keys_schema))
        self.train, self.evaluation, self.reused_rows = Side(), Side(), 0
        self._first: dict[str, list[tuple[str, Tokens]]] = {}
        """The first training rows of the first files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def write(self, rows: Sequence[Finished]) -> None:
        """Append rows to their side; those that are too long are counted instead."""
        kept = [row for row in rows if self._fits(row)]
        for row in kept:
            if row.cut and row.part <= 1:
                self._tally.notice(RowProblem("shortened", row.cut), row.file, row.row)
        kept = [row for row in kept for _ in range(1 if row.evaluation else row.copies)]
        train = [row for row in kept if not row.evaluation]
        evaluation = [row for row in kept if row.evaluation]
        self._write_train([_token_row(row) for row in train])
        self._write_evaluation([_token_row(row) for row in evaluation])
        self._write_prompts([row.prompt for row in evaluation if row.prompt])
        keys = [NO_KEY if row.cut else row.key for row in kept]
        sides = [pa.array(keys, pa.binary(16)), pa.array([row.evaluation for row in kept])]
        self._keys.write(pa.RecordBatch.from_arrays(sides, schema=self._keys_schema))
        for row in kept:
            (self.evaluation if row.evaluation else self.train).add(row.tokens)
            self.reused_rows += row.reused
            counts = self._tally.files[row.file]
            if row.evaluation:
                counts.evaluation_rows += 1
                continue
            counts.train_rows += 1
            counts.train_tokens += len(row.tokens.ids)
            if row.file in self._first or len(self._first) < PREVIEW_ROWS:
                first = self._first.setdefault(row.file, [])
                if len(first) < PREVIEW_ROWS:
                    first.append((row.row_id, row.tokens))

    @property
    def preview(self) -> list[tuple[str, Tokens]]:
        """Name and tokens of a few training rows, of different files if there are several."""
        in_turn = (row for rows in zip_longest(*self._first.values()) for row in rows if row is not None)
        return list(islice(in_turn, PREVIEW_ROWS))

    def _fits(self, row: Finished) -> bool:
        length = len(row.tokens.ids)
        if length > self._seq_len_tokens:
            found = f"{length} tokens, {self._seq_len_tokens} are allowed"
            self._tally.drop(RowProblem("too_long", found), row.file, row.row)
        return length <= self._seq_len_tokens


def _token_row(row: Finished) -> TokenRow:
    return TokenRow(row.row_id, row.tokens.ids, row.tokens.mask)
