"""Read raw files row by row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_core.data.reasons import RowProblem
from qlora_core.errors import DataError

SMALL_FILE_BYTES = 64 * 2**20
"""Up to this size `inspect` parses a whole file."""
FIRST_ROWS = 1000
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".json", ".jsonl", ".ndjson")


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each row, counted from 1: lines of JSONL, items of a JSON list.

    A line that cannot be read comes as a `RowProblem` in place of its value.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if path.suffix not in ROW_SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}; rows are read from {', '.join(ROW_SUFFIXES)}")
    return _json_list(path) if path.suffix == ".json" else _json_lines(path)


def read_text(path: Path, characters: int) -> str:
    """The start of a file's text: of a plain text file as it is, else of its rows' `text` fields, a line each.

    Raises:
        DataError: it cannot be read.
    """
    if path.suffix not in ROW_SUFFIXES:
        try:
            with path.open(encoding="utf-8-sig") as file:
                return file.read(characters)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
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
        raise DataError(f"{path} is not a file; check the path in data.rows")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; it must hold at least one row")
    if path.suffix in TEXT_SUFFIXES:
        read_text(path, 4096)
        return
    if path.suffix == ".json" and path.stat().st_size > SMALL_FILE_BYTES:
        _look_at_start(path)
        return
    limit = None if path.stat().st_size <= SMALL_FILE_BYTES else FIRST_ROWS
    rows = 0
    for rows, (number, row) in enumerate(read_rows(path), 1):
        if isinstance(row, RowProblem):
            raise DataError(f"{path}, line {number}: {row.detail}; write one JSON object per line, as UTF-8")
        if rows == limit:
            break
    if rows == 0:
        raise DataError(f"{path} holds no rows; it must hold at least one")


def _look_at_start(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        raise DataError(f"{path} starts with {start[:20]!r}; a .json file holds one list of objects")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowProblem("bad_encoding", f"byte {error.start + 1} is not UTF-8")
    except json.JSONDecodeError as error:
        return RowProblem("not_json", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowProblem("not_json", str(error) or type(error).__name__)


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        hint = "name it .jsonl if it holds one object per line" if error.msg == "Extra data" else "correct it there"
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; {hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be parsed as JSON ({error}); it must be one list of objects") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds one {type(rows).__name__}; a .json file holds one list of objects")
    yield from enumerate(rows, 1)
