"""Render conversations with the tokenizer's own chat template and find which characters the model must learn.

The template is a black box. For each sequence of roles it is rendered once with marks in place of the messages, which
gives the literal pieces between them (the skeleton). Where the template is shown to write the same pieces around any
words (`blueprint.py`), a row is put together from them; else it is rendered and aligned with skeleton and messages,
character for character: a row whose alignment does not come out is refused, so a span is never a guess.

A trained span starts where the generation prompt ends and stops after the token that ends the turn, without the white
space that some templates write after it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from qlora_core.data.blueprint import ALTERATIONS, Blueprint, draw, keeps_track
from qlora_core.data.conversation import Call, Conversation, Message, Role
from qlora_core.data.fit import Abilities, fit, tool_schema
from qlora_core.data.reasons import RowProblem
from qlora_core.errors import DataError
from qlora_core.modeling.rows import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]


class Rendered(NamedTuple):
    """A conversation as text, and the character spans in it that carry loss."""

    text: str
    spans: tuple[Span, ...]
    answer: Span = (0, 0)
    """The last assistant turn, with its turn end."""


Loss = Literal["assistant_turns", "last_turn", "everything"]


class _Skeleton(NamedTuple):
    """What stands between the messages of a conversation, `messages + 1` pieces."""

    pieces: tuple[str, ...]
    leads: tuple[int, ...]
    """For each message, how many characters before it belong to its turn, after the generation prompt."""
    tails: tuple[int, ...]
    """For each message, how many characters after it belong to its turn, with the token that ends it."""
    blueprint: Blueprint | None = None
    """How other words are written between the same pieces, if that is known."""


class ChatTemplate:
    """A tokenizer's chat template.

    Raises:
        DataError: there is none, or it does not end the assistant's turns with a special token, so that a model
            trained with it would never stop.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; use the instruct version of the model, "
                "or put a chat_template.jinja beside its tokenizer.json"
            )
        self._tokenizer = tokenizer
        self.special_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        template = tokenizer.chat_template
        self._keeps_track = isinstance(template, str) and keeps_track(template)
        self.turn_end = self._find_turn_end()
        self.abilities = self._find_abilities()

    def render(self, conversation: Conversation, loss: Loss = "assistant_turns") -> Rendered:
        """The whole conversation, and the spans that carry loss; none for turns that are marked not to train.

        Raises:
            RowProblem: the template refuses the conversation, or writes something else than its messages.
        """
        if conversation.plain:
            return self._plain(conversation.messages[0].content)
        fitted = fit(conversation, self.abilities)
        skeleton = self._skeleton(fitted)
        text, places = self._write(fitted, skeleton)
        spans = [
            (start - skeleton.leads[at], end + skeleton.tails[at])
            for at, (start, end) in enumerate(places)
            if fitted.messages[at].role == "assistant"
        ]
        return Rendered(text, _chosen(fitted, spans, text, loss), spans[-1])

    def prompt(self, conversation: Conversation, rendered: Rendered) -> PromptRow:
        """The text up to the last assistant turn, with the generation prompt, and what the model should answer.

        Its ids are left empty. Its messages are the turns before the answer, as a server would be sent them.
        """
        if conversation.plain:
            start, end = rendered.answer
            begun = rendered.text[:start]
            turn = json.dumps([{"role": "user", "content": begun}], ensure_ascii=False)
            return PromptRow(conversation.place, [], begun, rendered.text[start:end].strip(), turn)
        fitted = fit(conversation, self.abilities)
        asked = _upto(fitted, max(at for at, m in enumerate(fitted.messages) if m.role == "assistant"))
        return PromptRow(
            row_id=conversation.place,
            prompt_ids=[],
            prompt=self._apply(asked, add_generation_prompt=True),
            expected=rendered.text[slice(*rendered.answer)].removesuffix(self.turn_end).strip(),
            messages=json.dumps([_as_dict(message) for message in asked.messages], ensure_ascii=False),
        )

    def _plain(self, text: str) -> Rendered:
        """The text between the tokens that begin and end a text for this tokenizer; its second half is the answer."""
        tokenizer = self._tokenizer
        begins = tokenizer.bos_token if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else ""
        opening = "" if not begins or text.startswith(begins) else begins
        ends = tokenizer.eos_token or ""
        closing = "" if text.rstrip().endswith(ends) else ends
        middle = len(text) // 2
        half = text.rfind(" ", 0, middle + 1)
        start = len(opening) + (half if half > 0 else middle)
        whole = opening + text + closing
        return Rendered(whole, ((len(opening), len(whole)),), (start, len(opening) + len(text)))

    def _write(self, conversation: Conversation, skeleton: _Skeleton) -> tuple[str, list[Span]]:
        """The text, and where each message stands in it."""
        contents = [message.content for message in conversation.messages]
        altered = skeleton.blueprint.alter(contents) if skeleton.blueprint else None
        if altered is not None:
            return _assemble(skeleton.pieces, altered)
        text = self._apply(conversation)
        return text, list(_align(text, skeleton.pieces, conversation.messages))

    def _skeleton(self, conversation: Conversation) -> _Skeleton:
        if conversation.tools or any(message.calls for message in conversation.messages):
            return self._make_skeleton(conversation)
        roles: tuple[Role, ...] = tuple(message.role for message in conversation.messages)
        if roles not in self._skeletons:
            skeleton = self._make_skeleton(_conversation(*roles))
            self._skeletons[roles] = skeleton._replace(blueprint=self._draw(skeleton, roles))
        return self._skeletons[roles]

    def _make_skeleton(self, conversation: Conversation) -> _Skeleton:
        marks = [_mark(at) for at in range(len(conversation.messages))]
        marked = _marked(conversation)
        text = self._apply(marked)
        if MARK.findall(text) != marks:
            roles = " ".join(message.role for message in conversation.messages)
            raise RowProblem("template", f"the template does not write each turn of {roles} once and in order")
        pieces = MARK.split(text)
        leads, tails = [], []
        for at, message in enumerate(marked.messages):
            ours = message.role == "assistant"
            leads.append(self._lead(marked, at, text) if ours else 0)
            tails.append(self._tail(message, pieces[at + 1], at) if ours else 0)
        return _Skeleton(tuple(pieces), tuple(leads), tuple(tails))

    def _draw(self, skeleton: _Skeleton, roles: Sequence[Role]) -> Blueprint | None:
        def render(contents: Sequence[str]) -> str:
            pairs = zip(roles, contents, strict=True)
            return self._apply(Conversation(tuple(Message(role, content) for role, content in pairs)))

        return draw(skeleton.pieces, render) if self._keeps_track else None

    def _lead(self, marked: Conversation, at: int, text: str) -> int:
        """Characters between the generation prompt and the message, such as a space or an empty thought."""
        prompt = self._apply(_upto(marked, at), add_generation_prompt=True)
        start = text.index(_mark(at))
        if text.startswith(prompt) and len(prompt) <= start:
            return start - len(prompt)
        opening = prompt[len(self._apply(_upto(marked, at))) :]
        found = text.rfind(opening, 0, start) if opening else -1
        if found < text.find(_mark(at - 1)):
            raise RowProblem("template", f"turn {at + 1} does not start with the generation prompt {opening!r}")
        return start - found - len(opening)

    def _tail(self, message: Message, piece: str, at: int) -> int:
        if piece.count(self.turn_end) != 1 or not (message.calls or piece.startswith(self.turn_end)):
            raise RowProblem("template", f"turn {at + 1} does not end with {self.turn_end!r} in this template")
        return piece.index(self.turn_end) + len(self.turn_end)

    def _find_turn_end(self) -> str:
        special = self.special_tokens
        ends = re.compile(r"\s*(?:" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        try:
            text = self._apply(_marked(_conversation("user", "assistant")))
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

    def _find_abilities(self) -> Abilities:
        calling = _conversation("user", "assistant", "tool", "assistant")
        call = Message("assistant", "", (Call("", {}),))
        return Abilities(
            system=self._can(_conversation("system", "user", "assistant")),
            tool_role=self._can(calling),
            tools=self._can(
                calling._replace(
                    messages=(calling.messages[0], call, *calling.messages[2:]), tools=({"name": _mark(4)},)
                )
            ),
        )

    def _can(self, conversation: Conversation) -> bool:
        try:
            text = self._apply(_marked(conversation))
        except RowProblem:
            return False
        return len(set(MARK.findall(text))) == len(conversation.messages) + len(conversation.tools)

    def _apply(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [_as_dict(message) for message in conversation.messages],
                tools=[tool_schema(tool) for tool in conversation.tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowProblem("template", str(error)) from None
        return str(text)


def _chosen(conversation: Conversation, spans: list[Span], text: str, loss: Loss) -> tuple[Span, ...]:
    if loss == "everything":
        return ((0, len(text)),)
    answers = [message for message in conversation.messages if message.role == "assistant"]
    chosen = [span for span, answer in zip(spans, answers, strict=True) if answer.train]
    return tuple(chosen[-1:] if loss == "last_turn" else chosen)


MARK = re.compile("\ue000[0-9]+\ue001")


def _mark(at: int) -> str:
    """Text from the private use area that stands for one message."""
    return f"\ue000{at}\ue001"


def _conversation(*roles: Role) -> Conversation:
    return Conversation(tuple(Message(role, "") for role in roles))


def _marked(conversation: Conversation) -> Conversation:
    """The conversation with a mark in place of each message, or of the name that a wordless call starts with."""
    return conversation._replace(messages=tuple(_mark_one(m, at) for at, m in enumerate(conversation.messages)))


def _mark_one(message: Message, at: int) -> Message:
    if message.calls and not message.content:
        first, *others = message.calls
        return message._replace(calls=(first._replace(name=_mark(at)), *others))
    return message._replace(content=_mark(at))


def _verbatim(message: Message) -> str:
    """What stands in the text where the mark was."""
    return message.content or (message.calls[0].name if message.calls else "")


def _upto(conversation: Conversation, at: int) -> Conversation:
    return conversation._replace(messages=conversation.messages[:at])


def _as_dict(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        turn["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in message.calls]
    return turn


def _assemble(pieces: Sequence[str], contents: Sequence[str]) -> tuple[str, list[Span]]:
    parts, places, at = [pieces[0]], [], len(pieces[0])
    for content, piece in zip(contents, pieces[1:], strict=True):
        places.append((at, at + len(content)))
        parts += (content, piece)
        at += len(content) + len(piece)
    return "".join(parts), places


def _align(text: str, pieces: Sequence[str], messages: Sequence[Message]) -> Iterator[Span]:
    """Find each message in a rendered text.

    Raises:
        RowProblem: the text is not made of pieces and messages.
    """
    at = 0
    for message, before, after in zip(messages, pieces, pieces[1:], strict=False):
        at = _skip(before, text, at)
        end = _end_of(_verbatim(message), text, at, after)
        yield at, end
        at = end
    if _skip(pieces[-1], text, at) != len(text):
        raise RowProblem("template", "the template writes more than the messages")


def _skip(piece: str, text: str, at: int) -> int:
    if not text.startswith(piece, at):
        raise RowProblem("template", f"the template writes {text[at : at + 40]!r} where {piece[:40]!r} was expected")
    return at + len(piece)


def _end_of(content: str, text: str, at: int, piece: str) -> int:
    """Where the message that starts at `at` ends, if what follows it is `piece`."""
    for alter in ALTERATIONS:
        written = alter(content)
        if text.startswith(written, at) and text.startswith(piece, at + len(written)):
            return at + len(written)
    raise RowProblem("template", f"the template alters the text {content[:40]!r}")
