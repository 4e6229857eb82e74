"""Which answers a report shows, side by side."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from qlora_core.artifacts import Record
from qlora_core.evaluation.metrics import describe
from qlora_core.evaluation.scored import ScoredAnswer

LONGEST_TEXT_CHARACTERS = 480


class Example(Record):
    """One prompt with what each model said to it."""

    row_id: str
    question: str
    """The last thing that the user said."""
    expected: str
    answers: dict[str, str]
    """By model."""
    quality: dict[str, float]
    """By model, 0 to 1: the mean of the recipe's metrics on this answer."""
    change: Literal["gained", "lost", "same"]


class Comparison(NamedTuple):
    """How the candidate's answers differ from its rival's: the champion's, or the base's if there is no champion."""

    rival: Literal["base", "champion"]
    better: int
    worse: int
    rows: int
    examples: list[Example]


def compare_answers(answers: Mapping[str, Sequence[ScoredAnswer]], most: int) -> Comparison:
    """Count where candidate and rival disagree, and pick examples: the worst losses first, then gains, then the rest.

    Args:
        answers: by model, `base` and `candidate` at least, all of the same prompts in the same order.
        most: how many examples at most; half of them losses if there are that many.
    """
    rival: Literal["base", "champion"] = "champion" if "champion" in answers else "base"
    rows = [dict(zip(answers, row, strict=True)) for row in zip(*answers.values(), strict=True)]
    gains = [_quality(row["candidate"]) - _quality(row[rival]) for row in rows]
    order = sorted(range(len(rows)), key=gains.__getitem__)
    lost = [index for index in order if gains[index] < 0]
    gained = [index for index in reversed(order) if gains[index] > 0]
    same = [index for index in order if gains[index] == 0]
    lost, gained, same = (_varied(part, rows) for part in (lost, gained, same))
    losses = min(len(lost), max(most // 2, most - len(gained) - len(same)))
    gains_shown = max(0, most - losses - min(2, len(same)))
    chosen = [*lost[:losses], *gained[:gains_shown], *same][:most]
    examples = [_example(rows[index], gains[index]) for index in chosen]
    return Comparison(rival, len(gained), len(lost), len(rows), examples)


def _varied(indices: Sequence[int], rows: Sequence[Mapping[str, ScoredAnswer]]) -> list[int]:
    """The same rows, the first of each expected answer before its repetitions."""
    first: dict[str, int] = {}
    for index in indices:
        first.setdefault(rows[index]["candidate"].expected, index)
    return [*first.values(), *(index for index in indices if index not in first.values())]


def _quality(answer: ScoredAnswer) -> float:
    shares = [value for name, value in answer.metrics.items() if describe(name).unit == "share"]
    return fmean(shares or answer.metrics.values() or [0.0])


def _example(row: Mapping[str, ScoredAnswer], gain: float) -> Example:
    any_answer = row["candidate"]
    return Example(
        row_id=any_answer.row_id,
        question=_shorten(any_answer.question),
        expected=_shorten(any_answer.expected),
        answers={name: _shorten(answer.answer) for name, answer in row.items()},
        quality={name: _quality(answer) for name, answer in row.items()},
        change="gained" if gain > 0 else "lost" if gain < 0 else "same",
    )


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT_CHARACTERS else text[:LONGEST_TEXT_CHARACTERS].rstrip() + " …"
