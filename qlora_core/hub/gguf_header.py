"""Read the header of a GGUF file that nobody vouches for.

The format is described in ggml's `docs/gguf.md`: magic, version, counts, key-value pairs, a table of tensors, then
aligned tensor data. Every count comes from the file, so each is checked against a limit before it is believed, and the
file's own size bounds what is read.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from qlora_core.errors import SourceError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_PAIRS = 10_000
MAX_TENSORS = 100_000
MAX_ARRAY_ITEMS = 4_000_000
MAX_STRING_BYTES = 2**20
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**40

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type of the format to its `struct` code, always little-endian."""


class GgufHeader(NamedTuple):
    """Metadata by key, and the shape of each tensor in the file's order of dimensions (fastest first)."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> GgufHeader:
    """Read and check a file's header; no tensor data is touched.

    Raises:
        SourceError: it is no GGUF file, is cut off, or claims something absurd.
    """
    if path.stat().st_size < 24:
        raise SourceError(f"{path.name} is no GGUF file: it has only {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(path.name, data)
        try:
            return _read(reader)
        except (struct.error, UnicodeDecodeError) as error:
            raise SourceError(f"{path.name} is damaged: its header breaks off or is not text ({error})") from None


def _read(reader: "_Reader") -> GgufHeader:
    magic, version = reader.take(4), reader.scalar("I")
    if magic != MAGIC or version not in VERSIONS:
        raise SourceError(
            f"{reader.name} starts with {magic!r} version {version}; a GGUF file of version 2 or 3 is needed"
        )
    tensors = reader.count("Q", MAX_TENSORS, "tensors")
    pairs = reader.count("Q", MAX_PAIRS, "metadata entries")
    metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(pairs)}
    return GgufHeader(metadata, dict(reader.tensor() for _ in range(tensors)))


class _Reader:
    """A position in the header; running past the end of the file is a `struct.error`."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self.name, self._data, self._at = name, data, 0

    def take(self, length: int) -> bytes:
        if self._at + length > len(self._data):
            raise struct.error(f"{length} bytes are missing at byte {self._at}")
        self._at += length
        return self._data[self._at - length : self._at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, code: str, limit: int, what: str) -> int:
        value: int = self.scalar(code)
        if value > limit:
            raise SourceError(f"{self.name} claims {value:,} {what}; at most {limit:,} are accepted")
        return value

    def string(self) -> str:
        return self.take(self.count("Q", MAX_STRING_BYTES, "bytes in a string")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise SourceError(
                f"{self.name} holds a metadata value of unknown type {kind}; the file is damaged or newer"
            )
        return self.scalar(SCALARS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...]]:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.count("I", MAX_DIMENSIONS, "dimensions in a tensor")))
        elements = 1
        for size in shape:
            elements *= size
        if elements > MAX_ELEMENTS:
            raise SourceError(
                f"{self.name} claims {elements:,} elements in {name}; at most {MAX_ELEMENTS:,} are accepted"
            )
        self.take(12)  # type and offset, which the loader of the weights reads for itself
        return name, shape

    def _array(self) -> list[Any]:
        kind = self.scalar("I")
        length = self.count("Q", MAX_ARRAY_ITEMS, "items in an array")
        if kind == STRING:
            return [self.string() for _ in range(length)]
        if kind not in SCALARS:
            raise SourceError(f"{self.name} holds an array of type {kind}; only strings and numbers are accepted")
        return list(
            struct.unpack(f"<{length}{SCALARS[kind]}", self.take(length * struct.calcsize(f"<{SCALARS[kind]}")))
        )
