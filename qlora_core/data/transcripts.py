"""Text that was rendered with some chat template before, parsed back into turns so that only answers carry loss."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from qlora_core.data.conversation import Message
from qlora_core.data.reasons import RowProblem

CHATML_TURN = re.compile(r"<\|im_start\|>(system|user|assistant|tool)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
INST_TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>\s*|(?=\[INST\])|\Z)", re.DOTALL)
INST_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)
GUANACO_TURN = re.compile(r"\s*###\s*(Human|Assistant):(.*?)(?=###\s*(?:Human|Assistant):|\Z)", re.DOTALL)
"""The three forms: ChatML; Llama 2's (arXiv:2307.09288); and that of the QLoRA paper's data (arXiv:2305.14314)."""


class _Form(NamedTuple):
    sign: str
    """Text in this form holds it."""
    turn: re.Pattern[str]


CHATML = _Form("<|im_start|>", CHATML_TURN)
INST = _Form("[INST]", INST_TURN)
GUANACO = _Form("### Human:", GUANACO_TURN)


def parse(text: str) -> list[Message]:
    """The turns of a transcript.

    Raises:
        RowProblem: it is in none of the forms that are known, or something stands between the turns.
    """
    form = next((form for form in (CHATML, INST, GUANACO) if form.sign in text), None)
    if form is None:
        raise RowProblem("unknown_transcript", f"none of {CHATML.sign}, {INST.sign}, {GUANACO.sign} in {text[:40]!r}")
    messages: list[Message] = []
    at = len(text) - len(text.lstrip())
    while at < len(text):
        turn = form.turn.match(text, at)
        if turn is None or turn.end() == at:
            raise RowProblem("unknown_transcript", f"no turn starts at character {at + 1}: {text[at : at + 40]!r}")
        messages += _turns(form, turn)
        at = turn.end()
    return messages


def _turns(form: _Form, turn: re.Match[str]) -> Iterator[Message]:
    if form is CHATML:
        yield Message(turn[1], turn[2])  # type: ignore[arg-type]  # the pattern allows roles alone
    elif form is GUANACO:
        yield Message("user" if turn[1] == "Human" else "assistant", turn[2].strip())
    else:
        question = turn[1]
        if system := INST_SYSTEM.match(question):
            yield Message("system", system[1].strip())
            question = system[2]
        yield Message("user", question.strip())
        if turn[2].strip():
            yield Message("assistant", turn[2].strip())
