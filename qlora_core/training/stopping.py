"""When to end by evaluation loss, and which state was the best: pure functions of what was reported."""

from collections.abc import Sequence

from qlora_core.events import Metrics
from qlora_core.recipe import EarlyStopping

EVALUATION_LOSS = "evaluation_loss"


def evaluations(history: Sequence[Metrics]) -> list[tuple[int, float]]:
    """Step and loss of every evaluation."""
    return [(m.step, m.values[EVALUATION_LOSS]) for m in history if EVALUATION_LOSS in m.values]


def best_evaluation(history: Sequence[Metrics]) -> tuple[int, float]:
    """Step and loss of the lowest evaluation; the first of equals.

    Raises:
        ValueError: there was no evaluation.
    """
    return min(evaluations(history), key=lambda pair: pair[1])


def best_step(history: Sequence[Metrics]) -> int | None:
    """Step of the lowest evaluation loss, None before the first evaluation."""
    return best_evaluation(history)[0] if evaluations(history) else None


def is_exhausted(history: Sequence[Metrics], limits: EarlyStopping) -> bool:
    """Whether the newest `patience` evaluations brought no improvement."""
    lowest, without = float("inf"), 0
    for _, loss in evaluations(history):
        without = 0 if loss < lowest - limits.min_improvement else without + 1
        lowest = min(lowest, loss)
    return without >= limits.patience
