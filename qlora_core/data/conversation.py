"""What every format is turned into: a conversation of messages, and where it came from."""

import hashlib
import json
from json.encoder import encode_basestring as quoted
from typing import Any, Literal, NamedTuple

from qlora_core.data.reasons import RowProblem

Role = Literal["system", "user", "assistant", "tool"]


class Call(NamedTuple):
    """A function that the assistant asks for."""

    name: str
    arguments: Any


class Message(NamedTuple):
    """One turn; an assistant turn that calls functions holds them in `calls`."""

    role: Role
    content: str
    calls: tuple[Call, ...] = ()
    train: bool = True
    """An assistant turn that is False is read but not learnt."""


class Conversation(NamedTuple):
    """One row of training data."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    file: str = ""
    row: int = 0
    """Counted from 1: the line of a JSONL file, the item of a JSON list."""
    plain: bool = False
    """Text that is learnt as it is: one message, which no chat template is asked about."""

    @property
    def place(self) -> str:
        """`file:row`, which identifies the row for people."""
        return f"{self.file}:{self.row}"

    @property
    def function(self) -> str | None:
        """Name of the first function that is called, if one is."""
        return next((call.name for message in self.messages for call in message.calls), None)


def content_key(conversation: Conversation) -> bytes:
    """16 bytes that depend on nothing but what is said, which tools there are, and which turns are not to be learnt.

    Raises:
        RowProblem: JSON in UTF-8 cannot hold it.
    """
    said = ",".join(map(_message_json, conversation.messages))
    tools = compact_json(conversation.tools) if conversation.tools else "[]"
    try:
        content = f"[[{said}],{tools}]".encode()
    except UnicodeEncodeError:
        raise RowProblem("broken_text", "the tools or a call hold half a character") from None
    return hashlib.blake2b(content, digest_size=16).digest()


def _message_json(message: Message) -> str:
    calls = compact_json(message.calls) if message.calls else "[]"
    return f'["{message.role}",{quoted(message.content)},{calls},{"true" if message.train else "false"}]'


def compact_json(value: Any) -> str:
    """JSON without spaces, characters beyond ASCII as they are: the form in which tools are written.

    Raises:
        RowProblem: JSON cannot hold the value.
    """
    return _json(value, (",", ":"))


def spaced_json(value: Any) -> str:
    """JSON with a space after commas and colons: the form in which calls are written, as models have seen JSON.

    Without the spaces a small model leaves the quotes of dates away.

    Raises:
        RowProblem: JSON cannot hold the value.
    """
    return _json(value, (", ", ": "))


def _json(value: Any, separators: tuple[str, str]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=separators, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowProblem("bad_tools", f"tools or calls that JSON cannot hold: {error}") from None
