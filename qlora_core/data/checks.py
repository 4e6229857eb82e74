"""Look at what is said in a conversation: damaged text, and text that would not mean what it says."""

import re
from collections.abc import Iterable

from qlora_core.data.conversation import Conversation
from qlora_core.data.reasons import RowProblem

CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r") + b"\x7f"
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")


class TextChecks:
    """The checks of every message; `special_tokens` are those of the tokenizer."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._openings = {token[0] for token in longest_first}

    def check(self, conversation: Conversation) -> None:
        """Raise a `RowProblem` for the first message that is damaged."""
        for at, message in enumerate(conversation.messages, 1):
            where = f"turn {at} ({message.role})"
            self._check(message.content, where)
            if not conversation.plain:  # plain text may have been rendered before
                self._check_special(message.content, where)

    def _check(self, text: str, where: str) -> None:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise RowProblem("broken_text", f"{where} holds half a character at {error.start + 1}") from None
        if "\ufffd" in text:
            raise RowProblem("broken_text", f"{where} holds the replacement character at {text.index(chr(0xFFFD)) + 1}")
        if len(data.translate(None, CONTROL)) != len(data):
            raise RowProblem("control_character", f"{where} holds an invisible control character")
        if "{{" in text and (placeholder := PLACEHOLDER.search(text)):
            raise RowProblem("placeholder", f"{where} holds {placeholder.group()}")

    def _check_special(self, text: str, where: str) -> None:
        if any(opening in text for opening in self._openings) and (token := self._special.search(text)):
            raise RowProblem("special_token", f"{where} holds {token.group()}")
