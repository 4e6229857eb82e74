"""Which answers a report shows, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from qlora_core.artifacts import Record
from qlora_core.evaluation.records import ScoredAnswer

LONGEST_TEXT_CHARACTERS = 480


class Example(Record):
    """One prompt with what each model said to it."""

    row_id: str
    question: str
    """The last thing that the user said."""
    expected: str
    answers: dict[str, str]
    right: dict[str, bool]
    """Whether each model's answer is fully right by the recipe's own metrics."""
    change: Literal["gained", "lost", "same"]


def read_answers(folder: Path) -> list[ScoredAnswer]:
    """The answers of one model; none if no metric asked for any."""
    path = folder / "answers.jsonl"
    if not path.is_file():
        return []
    return [ScoredAnswer.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choose_examples(answers: Mapping[str, Sequence[ScoredAnswer]], most: int) -> list[Example]:
    """The candidate's worst changes first, then what it gained, then what stayed; at most a quarter are losses.

    Args:
        answers: by model, `base` and `candidate` at least, all of the same prompts in the same order.
        most: how many examples at most.
    """
    grouped = [dict(zip(answers, row, strict=True)) for row in zip(*answers.values(), strict=True)]
    ranked = sorted(grouped, key=_gain)
    lost = [row for row in ranked if _gain(row) < 0][: max(1, most // 4)]
    gained = [row for row in reversed(ranked) if _gain(row) > 0]
    same = [row for row in ranked if _gain(row) == 0]
    return [_example(row) for row in (*lost, *gained[: most - len(lost) - min(2, len(same))], *same)][:most]


def _quality(answer: ScoredAnswer) -> float:
    return fmean(answer.metrics.values()) if answer.metrics else 0.0


def _gain(row: Mapping[str, ScoredAnswer]) -> float:
    return _quality(row["candidate"]) - _quality(row["base"])


def _example(row: Mapping[str, ScoredAnswer]) -> Example:
    gain, any_answer = _gain(row), row["candidate"]
    return Example(
        row_id=any_answer.row_id,
        question=_shorten(any_answer.question),
        expected=_shorten(any_answer.expected),
        answers={name: _shorten(answer.answer) for name, answer in row.items()},
        right={name: _quality(answer) == 1 for name, answer in row.items()},
        change="gained" if gain > 0 else "lost" if gain < 0 else "same",
    )


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT_CHARACTERS else text[:LONGEST_TEXT_CHARACTERS].rstrip() + " …"
