"""The forms in which conversations come, and how each becomes a `Conversation`.

- alpaca: instruction, input, output, and optionally system and history (pairs of question and answer).
- sharegpt: conversations [{from, value}], and optionally system and tools; Belle and Qwen name the roles differently.
- messages: OpenAI's messages [{role, content, tool_calls}], and optionally tools.
- prompt_completion: prompt, completion.
- transcript: text that was rendered before, parsed back into turns (`transcripts.py`).
- text: the same field, learnt as it is; never found by looking, because a transcript's questions would be learnt too.

In sharegpt and messages a turn with `"train": false` is read but not learnt.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from qlora_core.data.conversation import Call, Conversation, Message, Role
from qlora_core.data.json_items import refuse_constant
from qlora_core.data.reasons import RowProblem
from qlora_core.data.transcripts import parse

Row = Mapping[str, Any]
MOST_CHARACTERS = 4_000_000
"""Of a row's texts: a thousand pages. Encoding more takes a gigabyte of memory, for a row that fits no context."""

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


FOLLOWS: dict[Role, tuple[Role, ...]] = {
    "system": ("system",),
    "user": ("system", "user", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""What may come before a turn; the start counts as the system's."""


class Format(NamedTuple):
    """How one format is recognized and read."""

    fields: frozenset[str]
    """A row that has all of them is in this format."""
    read: Callable[[Row], Iterator[Message]]


def to_conversation(row: Any, name: str, file: str, number: int) -> Conversation:
    """Read one row in the format `name`; `auto` looks at its fields.

    Raises:
        RowProblem: the row is not what the format says.
    """
    if not isinstance(row, dict):
        raise RowProblem("not_object", f"found {type(row).__name__}")
    form = _recognize(row) if name == "auto" else FORMATS[name]
    missing = sorted(form.fields - row.keys())
    if missing:
        raise RowProblem("missing_field", f"`{missing[0]}` is missing; the row has {_names(row)}")
    if form is FORMATS["text"]:
        texts = tuple(form.read(row))
        _check_size(texts)
        return Conversation(texts, (), file, number, plain=True)
    messages = tuple(form.read(row))
    _check_size(messages)
    _check_turns(messages)
    return Conversation(messages, _tools(row.get("tools")), file, number)


def _recognize(row: Row) -> Format:
    for form in FORMATS.values():
        if form.fields <= row.keys():
            return form
    raise RowProblem("unknown_format", f"the row has {_names(row)}; known are {_known()}")


def _alpaca(row: Row) -> Iterator[Message]:
    if row.get("system"):
        yield Message("system", _text(row, "system"))
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowProblem("wrong_type", f"`history` must be a list, it is {_short(history)}")
    for pair in history:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            raise RowProblem("wrong_type", "`history` must be a list of pairs of question and answer")
        yield Message("user", pair[0])
        yield Message("assistant", pair[1])
    question = [_text(row, "instruction"), _text(row, "input") if row.get("input") else ""]
    yield Message("user", "\n".join(part for part in question if part))
    yield Message("assistant", _text(row, "output"))


def _sharegpt(row: Row) -> Iterator[Message]:
    if row.get("system"):
        yield Message("system", _text(row, "system"))
    for turn in _turns(row, "conversations"):
        name = _text(turn, "from")
        if name == "function_call":
            yield Message("assistant", "", tuple(_parse_calls(_text(turn, "value"))), _train(turn))
        else:
            yield Message(_role(name), _text(turn, "value"), (), _train(turn))


def _openai(row: Row) -> Iterator[Message]:
    for turn in _turns(row, "messages"):
        role = _role(_text(turn, "role"))
        content = turn.get("content")
        text = "" if content is None else _text(turn, "content")
        calls = turn.get("tool_calls")
        if calls and role != "assistant":
            raise RowProblem("bad_tool_call", f"`tool_calls` in a turn by {role}; only the assistant calls")
        yield Message(role, text, tuple(_openai_calls(calls)) if calls else (), _train(turn))


def _prompt_completion(row: Row) -> Iterator[Message]:
    yield Message("user", _text(row, "prompt"))
    yield Message("assistant", _text(row, "completion"))


def _transcript(row: Row) -> Iterator[Message]:
    return iter(parse(_text(row, "text")))


def _whole_text(row: Row) -> Iterator[Message]:
    text = _text(row, "text")
    if not text.strip():
        raise RowProblem("empty_message", "`text` is empty")
    yield Message("assistant", text)


FORMATS: dict[str, Format] = {
    "messages": Format(frozenset({"messages"}), _openai),
    "sharegpt": Format(frozenset({"conversations"}), _sharegpt),
    "alpaca": Format(frozenset({"instruction", "output"}), _alpaca),
    "prompt_completion": Format(frozenset({"prompt", "completion"}), _prompt_completion),
    "transcript": Format(frozenset({"text"}), _transcript),
    "text": Format(frozenset({"text"}), _whole_text),
}


def _train(turn: Row) -> bool:
    train = turn.get("train", True)
    if not isinstance(train, bool):
        raise RowProblem("wrong_type", f"`train` must be true or false, it is {_short(train)}")
    return train


def _openai_calls(calls: Any) -> list[Call]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowProblem("bad_tool_call", "`tool_calls` must be a list of objects")
    return [_call(call.get("function", call)) for call in calls]


def _parse_calls(text: str) -> list[Call]:
    value = _read_json(text, "bad_tool_call")
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise RowProblem("bad_tool_call", f"no function name in {_short(value)}")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _read_json(arguments, "bad_tool_call") if arguments.strip() else {}
    return Call(value["name"], arguments)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        value = _read_json(value, "bad_tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowProblem("bad_tools", f"`tools` is {_short(value)}")
    return tuple(value)


def _read_json(text: str, code: str) -> Any:
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        raise RowProblem(code, f"not JSON: {_short(text)}") from None


def _turns(row: Row, field: str) -> list[Row]:
    turns = row[field]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowProblem("wrong_type", f"`{field}` must be a list of objects, it is {_short(turns)}")
    return turns


def _role(name: str) -> Role:
    role = ROLES.get(name)
    if role is None:
        raise RowProblem("unknown_role", f"role {_short(name)}; known are {', '.join(ROLES)}")
    return role


def _text(row: Row, field: str) -> str:
    if field not in row:
        raise RowProblem("missing_field", f"`{field}` is missing; found {_names(row)}")
    value = row[field]
    if not isinstance(value, str):
        raise RowProblem("wrong_type", f"`{field}` must be text, it is {_short(value)}")
    return value


def _check_size(messages: tuple[Message, ...]) -> None:
    characters = sum(len(message.content) for message in messages)
    if characters > MOST_CHARACTERS:
        raise RowProblem("too_large", f"{characters:,} characters; at most {MOST_CHARACTERS:,}")


def _check_turns(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if not any(message.role == "assistant" and message.train for message in messages):
        raise RowProblem("no_answer", f"{len(messages)} turns, none by the assistant that is to be learnt")
    for at, message in enumerate(messages):
        before = "system" if at == 0 else roles[at - 1]
        if before not in FOLLOWS[message.role] or (message.role == "system" and at > 0):
            found = "first" if at == 0 else f"after {before}"
            raise RowProblem("role_order", f"turn {at + 1} is by {message.role}, {found}")
        if message.role == "tool" and before == "assistant" and not messages[at - 1].calls:
            raise RowProblem("role_order", f"turn {at + 1} is a tool's answer, but nothing was called")
        if not message.calls and message.role in ("user", "assistant") and not message.content.strip():
            raise RowProblem("empty_message", f"turn {at + 1} ({message.role}) is empty")


def _names(row: Row) -> str:
    return ", ".join(map(str, list(row)[:8])) or "no fields"


@cache
def _known() -> str:
    return "; ".join(f"{name} ({', '.join(sorted(form.fields))})" for name, form in FORMATS.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
