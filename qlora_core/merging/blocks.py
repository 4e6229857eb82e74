"""Blocks of tensors: a few rows each, read and written at their places in files, worked on by some threads."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from qlora_core.merging.tensors import FLOATS, StoredTensor, read_bytes, write_bytes

BLOCK_ELEMENTS = 1 << 20
T = TypeVar("T")
J = TypeVar("J")


class Block(NamedTuple):
    """Rows of one tensor, in the base and in the merged model."""

    source: StoredTensor
    target: StoredTensor
    first_row: int
    rows: int


class Scratch(threading.local):
    """Each thread's own buffers, taken again for every block: fresh memory costs more than the arithmetic on it."""

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
