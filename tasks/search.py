"""Which point of a sweep comes next: all of a grid, or Optuna's proposals."""

import json
from collections.abc import Iterator
from typing import Protocol

from qlora_core.errors import QloraError
from qlora_core.sweep import Range, Space

STARTUP_TRIALS = 5
"""Drawn at random before the sampler learns from what came out."""


class Search(Protocol):
    """Asks for trials one after another, and is told what came of each."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Points, each asked for after the last one was told."""

    def tell(self, loss: float | None) -> None:
        """What came of the point that was asked for last; None for a failure."""


def search(space: Space, trials: int | None, seed: int) -> Search:
    """The whole grid when no number of trials is given.

    Raises:
        QloraError: Optuna is needed and not installed.
    """
    return Grid(space) if trials is None else Proposals(space, trials, seed)


class Grid:
    """Every combination, in the order written."""

    def __init__(self, space: Space) -> None:
        self._points = space.points()

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self._points)

    def tell(self, loss: float | None) -> None:
        """A grid learns nothing."""


class Proposals:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), the lower the loss the better.

    Seeded by the recipe: a sweep that was interrupted asks for the same points again, whose trainings are reused.
    """

    def __init__(self, space: Space, trials: int, seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise QloraError("--trials needs Optuna; install it with: pip install 'qlora-flows[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        )
        self._space, self._trials = space, trials

    def __iter__(self) -> Iterator[dict[str, str]]:
        for _ in range(self._trials):
            trial = self._trial = self._study.ask()
            chosen = {key: str(trial.suggest_categorical(key, values)) for key, values in self._space.grid.items()}
            drawn = {key: json.dumps(self._draw(key, part)) for key, part in self._space.ranges.items()}
            yield chosen | drawn

    def tell(self, loss: float | None) -> None:
        """What came of the last proposal."""
        if loss is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, loss)

    def _draw(self, key: str, part: Range) -> float:
        if part.whole:
            return int(self._trial.suggest_int(key, int(part.low), int(part.high), log=part.by_magnitude))
        return float(f"{self._trial.suggest_float(key, part.low, part.high, log=part.by_magnitude):.4g}")
