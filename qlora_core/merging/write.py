"""Write the merged tensors: block by block, the same bytes for any number of threads.

A block is a fixed number of a tensor's rows. Each is read, changed in fp32, rounded once and written to its own
place by one thread, whose products run on that thread alone; so neither the number of threads nor their order can
be seen in the result, and no more than a few blocks are ever in memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from qlora_core.errors import MergeError
from qlora_core.events import Progress, Report
from qlora_core.merging.changes import Change
from qlora_core.merging.tensors import FLOATS, Shard, StoredTensor, read_bytes, write_bytes
from qlora_core.store import discard

BLOCK_ELEMENTS = 1 << 20
T = TypeVar("T")
J = TypeVar("J")


class Block(NamedTuple):
    """Rows of one tensor, in the base and in the merged model."""

    source: StoredTensor
    target: StoredTensor
    first_row: int
    rows: int


class Opened(NamedTuple):
    """A file descriptor each for the files of the base and of the merged model."""

    descriptors: Mapping[Path, int]

    def read(self, tensor: StoredTensor, first_row: int, rows: int) -> torch.Tensor:
        """Rows of a tensor: `[rows, columns]` of its dtype, or uint8 bytes `[n]` if it is no float tensor."""
        row_bytes = tensor.bytes // max(1, tensor.rows)
        raw = torch.empty(rows * row_bytes, dtype=torch.uint8)
        read_bytes(self.descriptors[tensor.file], raw, tensor.start + first_row * row_bytes)
        return raw.view(FLOATS[tensor.dtype]).view(rows, tensor.columns) if tensor.dtype in FLOATS else raw

    def write(self, tensor: StoredTensor, first_row: int, values: torch.Tensor) -> None:
        """Put rows at their place."""
        row_bytes = tensor.bytes // max(1, tensor.rows)
        write_bytes(self.descriptors[tensor.file], values, tensor.start + first_row * row_bytes)


def write_shards(
    shards: Sequence[Shard],
    base: Mapping[str, StoredTensor],
    changes: Mapping[str, Change],
    threads: int,
    report: Report,
) -> None:
    """Write every shard; tensors without a change keep their bytes, or are cast once.

    Raises:
        MergeError: there is no room on the disk.
    """
    _allocate(shards)
    with one_thread_each(threads) as each:
        for number, shard in enumerate(shards, start=1):
            with opened([*{base[t.name].file for t in shard.tensors}], [shard.file]) as files:
                each(partial(_merge, files=files, changes=changes), blocks(shard.tensors, base))
            report(Progress(what="merge", done=number, total=len(shards), unit="shards"))


def blocks(targets: Iterable[StoredTensor], base: Mapping[str, StoredTensor]) -> Iterator[Block]:
    """Cut tensors into blocks of about `BLOCK_ELEMENTS` elements; the cut depends on shapes only."""
    for target in targets:
        rows = max(1, BLOCK_ELEMENTS // max(1, target.columns))
        for first in range(0, target.rows, rows):
            yield Block(base[target.name], target, first, min(rows, target.rows - first))


@contextmanager
def one_thread_each(threads: int) -> Iterator[Callable[[Callable[[J], T], Iterable[J]], list[T]]]:
    """A map over jobs on some threads, where each job's own arithmetic runs on one; results in the jobs' order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda work, jobs: list(pool.map(work, jobs))
    finally:
        torch.set_num_threads(before)


@contextmanager
def opened(read: Iterable[Path], write: Iterable[Path] = ()) -> Iterator[Opened]:
    """Open files for positioned reads and writes."""
    descriptors: dict[Path, int] = {}
    try:
        for files, mode in ((read, os.O_RDONLY), (write, os.O_WRONLY)):
            for file in files:
                descriptors[file] = os.open(file, mode)
        yield Opened(descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _allocate(shards: Sequence[Shard]) -> None:
    """Write the headers and take all disk space at once, so that a full disk is known before the work."""
    try:
        for shard in shards:
            with shard.file.open("wb") as file:
                file.write(shard.header)
                file.flush()
                os.posix_fallocate(file.fileno(), 0, shard.bytes)
    except OSError as error:
        folder = shards[0].file.parent
        discard(folder)
        total = sum(shard.bytes for shard in shards)
        raise MergeError(
            f"{folder} needs {total:,} bytes and cannot have them: {error.strerror}; "
            "free some space or put the store on another disk"
        ) from None


def _merge(block: Block, files: Opened, changes: Mapping[str, Change]) -> None:
    source, target, first, rows = block
    values = files.read(source, first, rows)
    change = changes.get(source.name)
    if change is not None:
        values = change.apply(values.float(), first)
    if target.dtype in FLOATS:
        values = values.to(FLOATS[target.dtype])
    files.write(target, first, values)
