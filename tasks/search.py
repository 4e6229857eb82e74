"""Which points of a sweep come next: all of a grid, or Optuna's proposals."""

import json
from collections.abc import Sequence
from typing import Any, Protocol

from qlora_core.errors import QloraError
from qlora_core.sweep import Range, Space

STARTUP_TRIALS = 5
"""Drawn at random before the sampler learns from what came out."""
Point = dict[str, str]


class Search(Protocol):
    """Is asked for points and told what came of them, batch by batch."""

    def ask(self, most: int) -> list[Point]:
        """The next points; none when all were tried."""

    def tell(self, losses: Sequence[float | None]) -> None:
        """What came of the points asked for last, in their order; None for a failure."""


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

    def ask(self, most: int) -> list[Point]:
        """The next of them."""
        asked, self._points = self._points[:most], self._points[most:]
        return asked

    def tell(self, losses: Sequence[float | None]) -> None:
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
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler)
        self._failed = optuna.trial.TrialState.FAIL
        self._space, self._left = space, trials
        self._asked: list[Any] = []

    def ask(self, most: int) -> list[Point]:
        """Proposals that do not wait for each other's outcome."""
        count = min(most, self._left)
        self._left -= count
        self._asked = [self._study.ask() for _ in range(count)]
        return [self._point(trial) for trial in self._asked]

    def tell(self, losses: Sequence[float | None]) -> None:
        """What came of the last proposals."""
        for trial, loss in zip(self._asked, losses, strict=True):
            self._study.tell(trial, loss, state=self._failed if loss is None else None)

    def _point(self, trial: Any) -> Point:
        chosen = {key: str(trial.suggest_categorical(key, values)) for key, values in self._space.grid.items()}
        return chosen | {key: json.dumps(_draw(trial, key, part)) for key, part in self._space.ranges.items()}


def _draw(trial: Any, key: str, part: Range) -> float:
    if part.whole:
        return int(trial.suggest_int(key, int(part.low), int(part.high), log=part.by_magnitude))
    return float(f"{trial.suggest_float(key, part.low, part.high, log=part.by_magnitude):.4g}")
