"""What an evaluation leaves on disk, one JSON line a row, and the scores that these rows give.

The child that scores a model and the report that compares models both read scores from here, so that a figure and its
interval always come from the same rows.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from qlora_core.artifacts import Record
from qlora_core.evaluation.bootstrap import RowSums, exp_ratio, mean_of, ratio
from qlora_core.evaluation.records import RowScores
from qlora_core.evaluation.text_overlap import corpus_bleu
from qlora_core.store import write_atomically

R = TypeVar("R", bound=Record)

ROWS, OTHER, ANSWERS, CHOICES, HARNESS = FILES = (
    "rows.jsonl",
    "forgetting.jsonl",
    "answers.jsonl",
    "choices.jsonl",
    "harness.jsonl",
)


class RowLoss(Record):
    """Sums over the trained tokens of one row."""

    row_id: str
    loss_sum: float
    """Cross entropy in nats."""
    correct: int
    """Tokens that the model would have chosen itself."""
    tokens: int


class ScoredAnswer(Record):
    """What one model said to one prompt."""

    row_id: str
    question: str
    """The last thing that the user said."""
    prompt: str
    """The whole rendered prompt."""
    expected: str
    answer: str
    stopped: bool
    """Whether the model ended its turn by itself."""
    tokens: int
    metrics: RowScores
    loss: float | None
    """Mean loss of the row's trained tokens, in nats."""


class RowChoice(Record):
    """The answer that one model finds most likely among those that rows expect."""

    row_id: str
    expected: str
    chosen: str


class HarnessRow(Record):
    """What one model scored on one example of a task of the lm-evaluation-harness."""

    task: str
    example: int
    metrics: RowScores
    """By `<task>_<metric>`."""


class Rows(Record):
    """Everything that one model scored, row by row."""

    losses: tuple[RowLoss, ...] = ()
    other: tuple[RowLoss, ...] = ()
    answers: tuple[ScoredAnswer, ...] = ()
    choices: tuple[RowChoice, ...] = ()
    harness: tuple[HarnessRow, ...] = ()


def write_rows(folder: Path, rows: Rows) -> None:
    """Write what there is."""
    parts = {
        ROWS: rows.losses,
        OTHER: rows.other,
        ANSWERS: rows.answers,
        CHOICES: rows.choices,
        HARNESS: rows.harness,
    }
    for name, part in parts.items():
        if part:
            write_atomically(folder / name, "".join(row.model_dump_json() + "\n" for row in part))


def read_rows(folder: Path) -> Rows:
    """Read what there is."""
    return Rows(
        losses=_read(folder / ROWS, RowLoss),
        other=_read(folder / OTHER, RowLoss),
        answers=_read(folder / ANSWERS, ScoredAnswer),
        choices=_read(folder / CHOICES, RowChoice),
        harness=_read(folder / HARNESS, HarnessRow),
    )


def row_sums(rows: Rows) -> dict[str, RowSums]:
    """Every score that these rows give, as sums over rows."""
    found = _loss_sums(rows.losses) if rows.losses else {}
    if rows.other:
        found["forgetting_perplexity"] = _loss_sums(rows.other)["perplexity"]
    if rows.answers:
        found |= _answer_sums(rows.answers)
    if rows.choices:
        found["choice_accuracy"] = mean_of([float(row.chosen == row.expected) for row in rows.choices])
    for task in dict.fromkeys(row.task for row in rows.harness):
        examples = [row.metrics for row in rows.harness if row.task == task]
        found |= {score: mean_of([metrics[score] for metrics in examples]) for score in examples[0]}
    return found


def _loss_sums(rows: Iterable[RowLoss]) -> dict[str, RowSums]:
    table = np.array([(row.loss_sum, row.correct, row.tokens) for row in rows], dtype=np.float64)
    return {
        "loss": RowSums(table[:, [0, 2]], ratio),
        "perplexity": RowSums(table[:, [0, 2]], exp_ratio),
        "token_accuracy": RowSums(table[:, [1, 2]], ratio),
    }


def _answer_sums(answers: Sequence[ScoredAnswer]) -> dict[str, RowSums]:
    found = {name: mean_of([answer.metrics[name] for answer in answers]) for name in answers[0].metrics}
    if "bleu" in found:
        found["bleu"] = corpus_bleu((answer.expected, answer.answer) for answer in answers)
    found["stops_by_itself"] = mean_of([float(answer.stopped) for answer in answers])
    found["answer_tokens"] = mean_of([float(answer.tokens) for answer in answers])
    return found


def _read(path: Path, kind: type[R]) -> tuple[R, ...]:
    if not path.is_file():
        return ()
    return tuple(kind.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines())
