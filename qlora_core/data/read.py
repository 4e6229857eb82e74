"""Read raw files row by row: JSON, JSONL, CSV and Parquet, plain or compressed with gzip or zstd, and plain text.

Rows stream: memory holds one block of a file, whatever its size.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.json_items import items, refuse_constant
from qlora_core.data.reasons import RowProblem
from qlora_core.errors import DataError

SMALL_FILE_BYTES = 64 * 2**20
"""Up to this size `inspect` parses a whole file."""
FIRST_ROWS = 1000
PARQUET_ROWS = 1024
BUFFER_BYTES = 2**20
COMPRESSIONS = (".gz", ".zst")
LONGEST_ROW_BYTES = 64 * 2**20
"""A line that unpacks to more is taken for a decompression bomb."""
TEXT_SUFFIXES = (".txt", ".md")
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
DECODER = json.JSONDecoder(parse_constant=refuse_constant)

Rows = Iterator[tuple[int, Any]]
"""Number of a row, counted from 1, and its value; a row that cannot be read comes as a `RowProblem`."""


def read_rows(path: Path) -> Rows:
    """The rows of a file: lines of JSONL, items of a JSON list, records of CSV or Parquet.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    suffix = _suffix(path)
    if suffix not in READERS:
        raise DataError(
            f"{path} ends in {path.suffix or 'no suffix'}; rows are read from {', '.join(READERS)}, "
            f"each also with {' or '.join(COMPRESSIONS)} after it"
        )
    try:
        yield from READERS[suffix](path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {error}; write the file again") from None


def read_text(path: Path, characters: int) -> str:
    """The start of a file's text: of a plain text file as it is, else of its rows' `text` fields, a line each.

    Raises:
        DataError: it cannot be read.
    """
    if _suffix(path) in TEXT_SUFFIXES:
        try:
            with _open_text(path) as file:
                return file.read(characters)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None
    parts, length = [], 0
    for number, row in read_rows(path):
        if not (isinstance(row, dict) and isinstance(row.get("text"), str)):
            raise DataError(f"{path}, row {number} has no `text`; plain text is read from that field")
        parts.append(row["text"])
        length += len(parts[-1])
        if length >= characters:
            break
    return "\n".join(parts)[:characters]


def inspect(path: Path) -> None:
    """Look at a raw file before anything is spent on it.

    Raises:
        DataError: it is missing, empty, or not what its suffix says, with the line and what to do.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; check the path in the recipe")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; it must hold at least one row")
    if _suffix(path) in TEXT_SUFFIXES:
        read_text(path, 4096)
        return
    limit = None if path.stat().st_size <= SMALL_FILE_BYTES else FIRST_ROWS
    rows = 0
    for number, row in read_rows(path):
        if isinstance(row, RowProblem):
            raise DataError(f"{path}, line {number}: {row.detail}; correct that line, the file must be UTF-8")
        rows += 1
        if rows == limit:
            break
    if rows == 0:
        raise DataError(f"{path} holds no rows; it must hold at least one")


def _suffix(path: Path) -> str:
    """`.jsonl` for `rows.jsonl.gz`."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return name.suffix.lower()


def _open(path: Path) -> io.BufferedReader:
    source = io.BufferedReader(pa.input_stream(str(path), compression="detect"), BUFFER_BYTES)
    start = source.peek(3)
    if start.startswith(UTF16_BOMS):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    if start.startswith(UTF8_BOM):
        source.read(len(UTF8_BOM))
    return source


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), encoding="utf-8", newline=newline)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{path} is not UTF-8: {_byte(error)}; save the file as UTF-8")


def _byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at {error.start + 1}"


def _json_list(path: Path) -> Rows:
    with _open_text(path) as file:
        try:
            yield from enumerate(items(file, str(path)), 1)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _json_lines(path: Path) -> Rows:
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW_BYTES), b""), 1):
            if len(line) == LONGEST_ROW_BYTES:
                raise DataError(f"{path}, line {number} has {LONGEST_ROW_BYTES:,} bytes or more, which is no row")
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowProblem("bad_encoding", f"{_byte(error)} is not UTF-8")
    except json.JSONDecodeError as error:
        return RowProblem("not_json", f"{error.msg} at column {error.colno}")
    except RecursionError:
        return RowProblem("not_json", "nested too deeply")
    except ValueError as error:
        return RowProblem("not_json", str(error))


def _csv(path: Path) -> Rows:
    with _open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {reader.line_num}: {error}; quote the field and double its quotes"
                ) from None
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from None
            uneven = None in row or None in row.values()
            problem = RowProblem("uneven_row", f"the header has {len(reader.fieldnames or ())} fields")
            yield reader.line_num, problem if uneven else row


def _parquet(path: Path) -> Rows:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
