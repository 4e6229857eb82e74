"""The items of one JSON list, read as a stream."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from qlora_core.errors import DataError

BLOCK_CHARACTERS = 2**20
WHITE_SPACE = " \t\n\r"
NO_WHITE_SPACE = re.compile(f"[^{WHITE_SPACE}]")
ENDS = frozenset(",]" + WHITE_SPACE)
"""What ends a value for certain: a block may end inside a number, whose start is a number too."""


def items(file: TextIO, name: str) -> Iterator[Any]:
    """Each item of the list that the file holds; memory holds one block, or one item if that is longer.

    Raises:
        DataError: it is no list, or not JSON, with line and column.
    """
    text = _Text(file, name)
    if text.skip_white_space() != "[":
        text.fail("a .json file holds one list of objects; name it .jsonl if it holds one object per line")
    text.at += 1
    first = True
    while text.skip_white_space() != "]":
        if not first and text.expect(",") == "]":
            text.fail("a comma stands before the end of the list")
        first = False
        yield text.value()
    text.at += 1
    if text.skip_white_space():
        text.fail("something follows the end of the list; a .json file holds one list of objects")


def refuse_constant(name: str) -> NoReturn:
    """For `parse_constant`: Python reads NaN and Infinity, JSON has neither."""
    raise ValueError(f"{name} is not JSON")


class _Text:
    """A window on JSON text that grows while a value goes on, and forgets what was read."""

    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name
        self._decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
            parse_constant=refuse_constant
        ).raw_decode
        self._text, self.at, self._lines, self._ended = "", 0, 0, False

    def skip_white_space(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            if found := NO_WHITE_SPACE.search(self._text, self.at):
                self.at = found.start()
                return found[0]
            self.at = len(self._text)
            if not self._more():
                return ""

    def expect(self, character: str) -> str:
        """Pass this character and return the one after it."""
        if self.skip_white_space() != character:
            found = self._text[self.at : self.at + 20]
            self.fail(f"`{character}` was expected, found {found!r}" if found else "the file ends inside the list")
        self.at += 1
        return self.skip_white_space()

    def value(self) -> Any:
        """The value that starts here."""
        while True:
            start = self.at
            try:
                value, end = self._decode(self._text, self.at)
                if self._text[end : end + 1] in ENDS:
                    self.at = end
                    return value
                if not self._more():
                    self.at = end - start
                    return value
            except json.JSONDecodeError as error:
                if not self._more():
                    self.at = error.pos - start
                    self.fail(error.msg)
            except RecursionError:
                self.fail("nested too deeply")
            except ValueError as error:
                self.fail(str(error))

    def fail(self, what: str) -> NoReturn:
        """Raise a DataError that names the place."""
        before = self._text[: self.at]
        line, column = self._lines + before.count("\n") + 1, self.at - before.rfind("\n")
        raise DataError(f"{self._name}, line {line}, column {column}: {what}; correct the file there")

    def _more(self) -> bool:
        """Read as much again as is waiting, so that the time stays linear; False at the end of the file."""
        self._lines += self._text.count("\n", 0, self.at)
        self._text, self.at = self._text[self.at :], 0
        block = "" if self._ended else self._file.read(max(BLOCK_CHARACTERS, len(self._text)))
        self._ended = not block
        self._text += block
        return bool(block)
