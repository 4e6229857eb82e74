"""Rows that are too long, cut between two exchanges: what a user says, and all that follows until they speak again.

A plain text is cut between two lines.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_core.data.conversation import Conversation, Message
from qlora_core.data.reasons import RowProblem
from qlora_core.data.template import ChatTemplate, Loss, Rendered
from qlora_core.data.tokenize import RowTokenizer, Tokens
from qlora_core.modeling.rows import PromptRow

Policy = Literal["drop", "truncate", "split", "fail"]


class Part(NamedTuple):
    """A piece of a conversation that fits."""

    conversation: Conversation
    rendered: Rendered
    tokens: Tokens


class Shortener:
    """Cuts conversations to `limit` tokens: to their start (`truncate`), or into several (`split`)."""

    def __init__(self, template: ChatTemplate, tokenize: RowTokenizer, loss: Loss, policy: Policy, limit: int) -> None:
        self._template, self._tokenize, self._loss, self._policy = template, tokenize, loss, policy
        self.limit = limit

    def parts(self, conversation: Conversation) -> list[Part]:
        """What is kept of a conversation that is too long, each with its system prompt and something to learn."""
        if self._policy not in ("truncate", "split"):
            return []
        system, exchanges = _lines(conversation) if conversation.plain else _exchanges(conversation.messages)
        sizes = self._sizes(exchanges)
        parts: list[Part] = []
        start = 0
        while start < len(exchanges) and not (parts and self._policy == "truncate"):
            guess = int(np.searchsorted(sizes, sizes[start] + self.limit, side="right")) - 1 - start
            longest = self._longest(conversation, system, exchanges, start, guess)
            if longest is None and self._policy == "truncate":
                break
            parts += [longest[1]] if longest else []
            start += longest[0] if longest else 1
        return parts

    def prompt(self, part: Part) -> PromptRow:
        """What a part asks."""
        prompt = self._template.prompt(part.conversation, part.rendered)
        ids = self._tokenize([Rendered(prompt.prompt, ())])[0].ids
        return prompt._replace(prompt_ids=ids.tolist())

    def _sizes(self, exchanges: list[list[Message]]) -> NDArray[np.int64]:
        """About how many tokens stand before each exchange, `[exchanges + 1]`: of their words, without the template."""
        texts = ["".join(message.content for message in exchange) for exchange in exchanges]
        counts = [len(tokens.ids) for tokens in self._tokenize([Rendered(text, ()) for text in texts])]
        return np.cumsum([0, *counts], dtype=np.int64)

    def _longest(
        self,
        conversation: Conversation,
        system: list[Message],
        exchanges: list[list[Message]],
        start: int,
        guess: int,
    ) -> tuple[int, Part] | None:
        """The most exchanges from `start` that fit, and how many they are; `guess` may be a wrong number of them."""
        fitting: dict[int, Part] = {}

        def fits(count: int) -> bool:
            messages = (*system, *chain.from_iterable(exchanges[start : start + count]))
            if conversation.plain:
                messages = (Message("assistant", "".join(line.content for line in messages)),)
            part = self._part(conversation._replace(messages=messages))
            if part is None or len(part.tokens.ids) > self.limit:
                return False
            fitting[count] = part
            return True

        count = most_that_fit(fits, guess, len(exchanges) - start)
        found = fitting.get(count)
        return None if found is None or not found.rendered.spans else (count, found)

    def _part(self, conversation: Conversation) -> Part | None:
        try:
            rendered = self._template.render(conversation, self._loss)
        except RowProblem:
            return None
        return Part(conversation, rendered, self._tokenize([rendered])[0])


def most_that_fit(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 if none does, where no number above one that does not fit fits.

    Steps away from the guess double, so that a good guess takes few tries, of numbers near it.
    """
    low, high, step = 0, most + 1, 1  # 0 fits, as it were, and more than there are does not
    at = min(max(guess, 1), most)
    while high - low > 1:
        if fits(at):
            low, at = at, at + step
        else:
            high, at = at, at - step
        if not low < at < high or (low > 0 and high <= most):  # found from both sides
            at = (low + high) // 2
        step *= 2
    return low


def _lines(text: Conversation) -> tuple[list[Message], list[list[Message]]]:
    """The lines of a plain text, which is cut between them."""
    return [], [[Message("assistant", line)] for line in text.messages[0].content.splitlines(keepends=True)]


def _exchanges(messages: tuple[Message, ...]) -> tuple[list[Message], list[list[Message]]]:
    """The system prompt, and the exchanges that end with the assistant."""
    system = [message for message in messages if message.role == "system"]
    return system, [part for part in _cut(messages[len(system) :]) if part[-1].role == "assistant"]


def _cut(messages: tuple[Message, ...]) -> Iterator[list[Message]]:
    part: list[Message] = []
    for message in messages:
        if message.role == "user" and part and part[-1].role == "assistant":
            yield part
            part = []
        part.append(message)
    if part:
        yield part
