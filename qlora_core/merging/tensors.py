"""Safetensors folders: where each tensor's bytes stand, and where they will stand in the merged model.

A safetensors file is eight bytes with the header's length (little endian), a JSON header that gives each tensor's
dtype, shape and byte range, and the bytes (https://github.com/huggingface/safetensors#format).
"""

import json
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_core.errors import MergeError, refusing

INDEX = "model.safetensors.index.json"
HEADER_LENGTH_BYTES = 8
ALIGNMENT_BYTES = 8
MAX_DIMENSIONS, MAX_COUNT = 16, 2**63
"""A header that has more lies, and multiplying its counts could take forever."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that a merge can change or cast; any other tensor is copied as it is."""
CODES = {dtype: code for code, dtype in FLOATS.items()}


class StoredTensor(NamedTuple):
    """One tensor's place: `bytes` bytes of `file` from `start` on."""

    name: str
    file: Path
    dtype: str
    """The format's code: `BF16`."""
    shape: tuple[int, ...]
    start: int
    bytes: int

    @property
    def rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements of one row."""
        return prod(self.shape[1:])


class Shard(NamedTuple):
    """One file of the merged model: its header and the tensors behind it, in the order of their bytes."""

    file: Path
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, in the order of files and bytes; only headers are read.

    Raises:
        MergeError: there are no safetensors, a shard of the index is missing, or a file is damaged.
    """
    index = _read_index(folder)
    files = sorted({folder / name for name in index.values()}) if index else sorted(folder.glob("*.safetensors"))
    if not files:
        raise MergeError(f"{folder} holds no safetensors file; convert the model to safetensors before merging")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise MergeError(f"{folder / INDEX} names {', '.join(missing)}, which is not there; download the model again")
    tensors = {tensor.name: tensor for file in files for tensor in read_file(file)}
    lost = sorted(set(index) - set(tensors))
    if lost:
        raise MergeError(f"{folder / INDEX} names {lost[0]}, which no shard holds; download the model again")
    return tensors


def read_file(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file in the order of their bytes.

    Raises:
        MergeError: the header cannot be read or lets tensors overlap, or the file is shorter or longer than it says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        data_start = HEADER_LENGTH_BYTES + length
        if data_start > size:
            raise _truncated(file, size, data_start)
        with refusing(MergeError, f"the header of {file}"):
            header: dict[str, Any] = json.loads(stream.read(length))
            named = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            tensors = [_stored(name, file, entry, data_start) for name, entry in named]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise MergeError(f"{tensor.name} starts inside another tensor of {file} or after a gap; write it again")
        end += tensor.bytes
    if end != size:
        raise _truncated(file, size, end)
    return tensors


def lay_out(tensors: Iterable[StoredTensor], dtype: torch.dtype | None, max_bytes: int, folder: Path) -> list[Shard]:
    """Where every tensor goes in the merged model: shards of at most `max_bytes`, a larger tensor alone in its own.

    The order is the base's. `dtype` is that of all floating-point tensors, None keeps each tensor's own.
    """
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        target = _cast(tensor, dtype)
        if groups[-1] and filled + target.bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(target)
        filled += target.bytes
    return [_shard(folder / _shard_name(at, len(groups)), group) for at, group in enumerate(groups, start=1)]


def write_index(shards: Sequence[Shard], folder: Path) -> None:
    """The index that transformers asks for when there are several shards."""
    if len(shards) == 1:
        return
    names = {tensor.name: shard.file.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.bytes for shard in shards for tensor in shard.tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n")


def read_bytes(descriptor: int, into: torch.Tensor, offset: int) -> None:
    """Fill a uint8 tensor from a file.

    Raises:
        MergeError: the file ends before the tensor is full.
    """
    view = into.numpy().data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise MergeError(f"a safetensors file ended at byte {offset} while it was read; it must not change")
        view, offset = view[count:], offset + count


def write_bytes(descriptor: int, data: torch.Tensor, offset: int) -> None:
    """Write a contiguous tensor's bytes to a place in a file."""
    view = data.view(-1).view(torch.uint8).numpy().data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _read_index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).is_file():
        return {}
    with refusing(MergeError, str(folder / INDEX)):
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        outside = [name for name in weight_map.values() if not name or Path(name).name != name]
        if outside:
            raise ValueError(f"it names {outside[0]!r}; shards lie beside it")
        return weight_map


def _stored(name: str, file: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    counts = (*shape, first, last - first)
    if len(shape) > MAX_DIMENSIONS or not all(isinstance(count, int) and 0 <= count < MAX_COUNT for count in counts):
        raise ValueError(f"{name} has the shape {shape} at the bytes from {first} to {last}")
    if dtype in FLOATS and prod(shape) * FLOATS[dtype].itemsize != last - first:
        raise ValueError(f"{name} of the shape {shape} in {dtype} has {last - first} bytes")
    return StoredTensor(name, file, dtype, shape, data_start + first, last - first)


def _truncated(file: Path, size: int, expected: int) -> MergeError:
    return MergeError(
        f"{file} has {size:,} bytes and its header asks for {expected:,}; it is truncated or damaged, download it again"
    )


def _cast(tensor: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
    if dtype is None or tensor.dtype not in FLOATS:
        return tensor
    return tensor._replace(dtype=CODES[dtype], bytes=prod(tensor.shape) * dtype.itemsize)


def _shard(file: Path, tensors: Sequence[StoredTensor]) -> Shard:
    widest_first = sorted(tensors, key=lambda tensor: -(tensor.bytes // max(1, prod(tensor.shape))))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for tensor in widest_first:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (first, first + tensor.bytes),
        }
        first += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    head = len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
    placed = (
        tensor._replace(file=file, start=len(head) + header[tensor.name]["data_offsets"][0]) for tensor in widest_first
    )
    return Shard(file, head, tuple(placed))


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
