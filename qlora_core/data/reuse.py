"""Tokens of an earlier data set: rows that are in it already are not rendered and tokenized again."""

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from qlora_core.artifacts import PreparedDataset
from qlora_core.data.tokenize import Tokens
from qlora_core.modeling.rows import PromptRow, TokenRows, read_prompts

KEYS_FILE = "keys.arrow"
KEYS_SCHEMA = pa.schema([("key", pa.binary(16)), ("evaluation", pa.bool_())])
"""One row for each row of train.arrow and evaluation.arrow together, in the order of each."""
WAY = b"way"


class Known(NamedTuple):
    """A row that was tokenized before."""

    tokens: Tokens
    prompt: PromptRow | None


class Earlier:
    """The rows of an earlier data set that was made with the same tokenizer and template; of none, nothing is known."""

    def __init__(self, path: Path | None) -> None:
        self._places: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        if path is None:
            return
        self._rows = (TokenRows(path / "train.arrow"), TokenRows(path / "evaluation.arrow"))
        self._prompts = read_prompts(path / "prompts.arrow")
        numbers = (count(), count())
        with pa.memory_map(str(path / KEYS_FILE)) as file:
            for batch in pa.ipc.open_file(file).read_all().to_batches():
                for key, evaluation in zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True):
                    self._places[evaluation][key] = next(numbers[evaluation])

    def find(self, key: bytes, evaluation: bool) -> Known | None:
        """The tokens of the row with this content, if it was on this side of the split."""
        at = self._places[evaluation].get(key)
        if at is None:
            return None
        row = self._rows[evaluation][at]
        return Known(Tokens(row.input_ids, row.loss_mask), self._prompts[at] if evaluation else None)


def keys_schema(way: str) -> pa.Schema:
    """The schema of a file of keys that says in which way the rows were made."""
    return KEYS_SCHEMA.with_metadata({WAY: way})


def comparable(earlier: Iterable[PreparedDataset], way: str) -> Path | None:
    """Where the first data set is whose rows were made in the same way."""
    for dataset in earlier:
        keys = dataset.path / KEYS_FILE
        if keys.is_file():
            with pa.memory_map(str(keys)) as file:
                if (pa.ipc.open_file(file).schema.metadata or {}).get(WAY) == way.encode():
                    return dataset.path
    return None
