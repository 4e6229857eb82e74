"""Blocks of tensors: a few rows each, read and written at their places in files, worked on by some processes."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from qlora_core.errors import MergeError
from qlora_core.merging.tensors import FLOATS, StoredTensor, read_bytes, write_bytes
from qlora_core.process import die_with_parent

BLOCK_ELEMENTS = 1 << 20
JOBS_AT_ONCE = 8
"""That a process takes; one by one, handing them out would cost as much as some of the work."""
T = TypeVar("T")
J = TypeVar("J")


class Block(NamedTuple):
    """Rows of one tensor, in the base and in the merged model."""

    source: StoredTensor
    target: StoredTensor
    first_row: int
    rows: int


class Scratch:
    """Buffers that are taken again for every block: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor, good until the same role is taken again."""
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(role)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[role] = torch.empty(size, dtype=torch.uint8)
        return buffer[:size].view(dtype).view(shape)

    def cast(self, role: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy in another dtype, rounded to nearest."""
        return self.take(role, tuple(values.shape), dtype).copy_(values)


class Opened(NamedTuple):
    """A file descriptor each for the files of the base and of the merged model."""

    descriptors: Mapping[Path, int]

    def read(self, tensor: StoredTensor, first_row: int, rows: int, scratch: Scratch, role: str) -> torch.Tensor:
        """Rows of a tensor: `[rows, columns]` of its dtype, or uint8 bytes `[n]` if it is no float tensor."""
        row_bytes = tensor.bytes // max(1, tensor.rows)
        raw = scratch.take(role, (rows * row_bytes,), torch.uint8)
        read_bytes(self.descriptors[tensor.file], raw, tensor.start + first_row * row_bytes)
        return raw.view(FLOATS[tensor.dtype]).view(rows, tensor.columns) if tensor.dtype in FLOATS else raw

    def write(self, tensor: StoredTensor, first_row: int, values: torch.Tensor) -> None:
        """Put rows at their place."""
        row_bytes = tensor.bytes // max(1, tensor.rows)
        write_bytes(self.descriptors[tensor.file], values, tensor.start + first_row * row_bytes)


def blocks(targets: Iterable[StoredTensor], base: Mapping[str, StoredTensor]) -> Iterator[Block]:
    """Cut tensors into blocks of about `BLOCK_ELEMENTS` elements; the cut depends on shapes only."""
    for target in targets:
        rows = max(1, BLOCK_ELEMENTS // max(1, target.columns))
        for first in range(0, target.rows, rows):
            yield Block(base[target.name], target, first, min(rows, target.rows - first))


def in_processes(work: Callable[[J], T], jobs: Sequence[J], processes: int) -> Generator[T, None, None]:
    """The results of all jobs in their order; each job's own arithmetic runs on one thread of one process.

    Not threads: a job is some dozens of array operations of a tenth of a millisecond, and 16 threads spend three
    quarters of their time handing Python's lock to each other. The processes are forked, so they start at once and
    share what was read so far.

    Raises:
        MergeError: a process was killed; or what a job raises.
    """
    inherited = (work, jobs, str(os.getpid()))
    try:
        with ProcessPoolExecutor(min(processes, max(1, len(jobs))), get_context("fork"), _begin, inherited) as pool:
            yield from pool.map(_job, range(len(jobs)), chunksize=JOBS_AT_ONCE)
    except BrokenProcessPool:
        raise MergeError(
            "a process of the merge was killed, which often means that the machine ran out of memory; "
            "free some and give the same command again"
        ) from None


@contextmanager
def opened(read: Iterable[Path], write: Iterable[Path] = ()) -> Iterator[Opened]:
    """Open files for positioned reads, and others for reads and writes."""
    descriptors: dict[Path, int] = {}
    try:
        for files, mode in ((read, os.O_RDONLY), (write, os.O_RDWR)):
            for file in files:
                descriptors[file] = os.open(file, mode)
        yield Opened(descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _begin(work: Callable[[J], Any], jobs: Sequence[J], parent: str) -> None:
    """The start of a forked process, which never outlives its parent."""
    global _work
    die_with_parent(parent)
    torch.set_num_threads(1)
    _work = lambda number: work(jobs[number])  # noqa: E731


def _job(number: int) -> Any:
    """Only the number of a job and its result travel between processes."""
    return _work(number)


_work: Callable[[int], Any]
"""In a forked process: what it inherited."""
