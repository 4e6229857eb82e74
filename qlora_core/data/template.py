"""Render conversations with the tokenizer's own chat template and find which characters the model must learn.

The template is a black box. For each sequence of roles it is rendered once with marks in place of the messages, which
gives the literal pieces between them (the skeleton). A real rendering is then aligned with skeleton and messages,
character for character: a row whose alignment does not come out is refused, so a span is never a guess.

A trained span starts where the generation prompt ends and stops after the token that ends the turn, without the white
space that some templates write after it.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from qlora_core.data.conversation import Conversation, Message
from qlora_core.data.reasons import RowProblem
from qlora_core.errors import DataError

ALTERATIONS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
"""What templates do to the white space around a message; tried in this order."""


class Rendered(NamedTuple):
    """A conversation as text, and the character spans in it that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


class _Skeleton(NamedTuple):
    """What stands between the messages of a sequence of roles, `messages + 1` pieces."""

    pieces: tuple[str, ...]
    leads: tuple[int, ...]
    """For each message, how many characters before it belong to its turn, after the generation prompt."""


class ChatTemplate:
    """A tokenizer's chat template.

    Raises:
        DataError: there is none, or it does not end the assistant's turns with a special token, so that a model
            trained with it would never stop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; use the instruct version of the model, "
                "or put a chat_template.jinja beside its tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        self._turn_end = self._find_turn_end()

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation, and the spans of its assistant turns.

        Raises:
            RowProblem: the template refuses the conversation, or writes something else than its messages.
        """
        messages = conversation.messages
        text = self._apply(messages)
        skeleton = self._skeleton(tuple(message.role for message in messages))
        spans, at = [], len(skeleton.pieces[0])
        if not text.startswith(skeleton.pieces[0]):
            raise self._not_verbatim(messages[0])
        for message, lead, piece in zip(messages, skeleton.leads, skeleton.pieces[1:], strict=True):
            end = _end_of(message.content, text, at, piece)
            if end is None:
                raise self._not_verbatim(message)
            if message.role == "assistant":
                spans.append((at - lead, end + len(self._turn_end)))
            at = end + len(piece)
        if at != len(text):
            raise self._not_verbatim(messages[-1])
        return Rendered(text, tuple(spans))

    def prompt_messages(self, conversation: Conversation) -> str:
        """The messages before the last assistant turn, as a JSON list."""
        last = max(at for at, message in enumerate(conversation.messages) if message.role == "assistant")
        turns = [{"role": message.role, "content": message.content} for message in conversation.messages[:last]]
        return json.dumps(turns, ensure_ascii=False)

    def prompt(self, conversation: Conversation) -> tuple[str, str]:
        """The rendered text up to the last assistant turn, with the generation prompt, and that turn's content."""
        messages = conversation.messages
        last = max(at for at, message in enumerate(messages) if message.role == "assistant")
        return self._apply(messages[:last], add_generation_prompt=True), messages[last].content

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        marks = [_mark(at) for at in range(len(roles))]
        messages = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]  # type: ignore[arg-type]
        text = self._apply(messages)
        pieces = re.split("|".join(marks), text)
        if re.findall("|".join(marks), text) != marks:
            raise RowProblem("template", f"the template does not write each of {' '.join(roles)} once and in order")
        leads = []
        for at, role in enumerate(roles):
            if role == "assistant" and not pieces[at + 1].startswith(self._turn_end):
                raise RowProblem("template", f"turn {at + 1} does not end with {self._turn_end!r} in this template")
            leads.append(self._lead(messages, at, text) if role == "assistant" else 0)
        return _Skeleton(tuple(pieces), tuple(leads))

    def _lead(self, messages: Sequence[Message], at: int, text: str) -> int:
        """Characters between the end of the generation prompt and the message, such as a space or an empty thought."""
        prompt = self._apply(messages[:at], add_generation_prompt=True)
        start = text.index(messages[at].content)
        if text.startswith(prompt) and len(prompt) <= start:
            return start - len(prompt)
        opening = prompt[len(self._apply(messages[:at])) :]
        found = text.rfind(opening, 0, start) if opening else -1
        if found < 0 or found < text.find(messages[at - 1].content):
            raise RowProblem("template", f"turn {at + 1} does not start with the generation prompt {opening!r}")
        return start - found - len(opening)

    def _find_turn_end(self) -> str:
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        ends = re.compile(r"\s*(?:" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        try:
            text = self._apply([Message("user", _mark(0)), Message("assistant", _mark(1))])
        except RowProblem as problem:
            raise DataError(f"the chat template cannot render one question and answer: {problem}") from None
        tail = text.partition(_mark(1))[2]
        match = ends.match(tail) if special else None
        if match is None:
            raise DataError(
                f"the chat template ends an assistant's turn with {tail!r}, which starts with none of the tokenizer's "
                f"special tokens ({', '.join(special[:8]) or 'it has none'}): the model would never learn to stop. "
                "Add the end token to the template, after the assistant's message"
            )
        return match.group()

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        turns: list[dict[str, Any]] = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowProblem("template", str(error)) from None
        return str(text)

    def _not_verbatim(self, message: Message) -> RowProblem:
        return RowProblem("template", f"the template alters the {message.role} turn {message.content[:40]!r}")


def _mark(at: int) -> str:
    """Text from the private use area that stands for one message."""
    return f"\ue000{at}\ue001"


def _end_of(content: str, text: str, at: int, piece: str) -> int | None:
    """Where the message that starts at `at` ends, if what follows it is `piece`."""
    for alter in ALTERATIONS:
        written = alter(content)
        if text.startswith(written, at) and text.startswith(piece, at + len(written)):
            return at + len(written)
    return None
