"""What a sweep tries: values of recipe keys, written as a user writes them, and what came of each trial."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_core.artifacts import Record
from qlora_core.errors import RecipeError
from qlora_core.recipe import Recipe

PICTURE = "trials.png"
LOG_RATIO = 10.0
"""A range that spans at least this factor is searched by orders of magnitude."""
DEFAULT_RANKS = (8, 16, 32, 64)
DEFAULT_FACTOR = 5.0
"""How far a sweep that names nothing looks below and above the recipe's learning rate."""


class Range(Record):
    """Numbers between two, both included."""

    low: float
    high: float
    whole: bool
    """Only whole numbers."""

    @property
    def by_magnitude(self) -> bool:
        """Whether each order of magnitude counts the same."""
        return self.low > 0 and self.high / self.low >= LOG_RATIO


class Space(Record):
    """Dotted keys of a recipe, and what is tried for each; values are JSON."""

    grid: dict[str, tuple[str, ...]]
    ranges: dict[str, Range]

    def points(self) -> list[dict[str, str]]:
        """Every combination of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def corners(self) -> list[dict[str, str]]:
        """Points that reach every value and both ends of every range, as few as there are values of one key."""
        ends = {key: tuple(map(_text, (part.low, part.high))) for key, part in self.ranges.items()}
        values = {**self.grid, **ends}
        longest = max(map(len, values.values()), default=0)
        return [{key: some[min(at, len(some) - 1)] for key, some in values.items()} for at in range(longest)]


class Trial(Record):
    """One point of the space, and what came of it."""

    number: int
    values: dict[str, str]
    loss: float | None
    """On the evaluation rows, in nats a token; None if it failed."""
    error: str = ""
    run_id: str = ""


def parse_space(grid: Sequence[str], ranges: Sequence[str], recipe: Recipe, with_trials: bool) -> Space:
    """Read what a user wrote: `train.learning_rate=1e-4,2e-4` for a grid, `train.lora.rank=8..64` for a range.

    Args:
        grid: keys with the values to try.
        ranges: keys with a lowest and a highest number.
        recipe: what is varied, for a search that names no key.
        with_trials: whether there is a number of trials; without one there is a grid and nothing else.

    Raises:
        RecipeError: it cannot be read, names a key twice, or does not fit together.
    """
    space = Space(grid=dict(map(_choices, grid)), ranges=dict(map(_range, ranges)))
    keys = [text.partition("=")[0].strip() for text in (*grid, *ranges)]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"{twice[0]} is named twice; name a key once, with all its values")
    if not with_trials and ranges:
        raise RecipeError(f"--range {ranges[0]} has no end of points; say how many with --trials N")
    if not with_trials and not grid:
        raise RecipeError("nothing to try; name values, `--grid train.learning_rate=1e-4,2e-4`, or say --trials N")
    return space if keys else _around(recipe)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial of the lowest loss.

    Raises:
        RecipeError: none has one.
    """
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        raise RecipeError(f"no trial of {len(trials)} came to an end; the first said: {trials[0].error}")
    return min(done, key=lambda trial: (trial.loss, trial.number))


def overrides(point: Mapping[str, str]) -> tuple[str, ...]:
    """The point as `load_recipe` takes it."""
    return tuple(f"{key}={value}" for key, value in point.items())


def plot(trials: Sequence[Trial], folder: Path) -> None:
    """Loss over the values of each key, in `folder / PICTURE`."""
    from matplotlib.figure import Figure

    done = [trial for trial in trials if trial.loss is not None]
    keys, best = list(trials[0].values), best_of(trials)
    figure = Figure(figsize=(4.5 * len(keys), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False, sharey=True)[0], keys, strict=True):
        values = [json.loads(trial.values[key]) for trial in done]
        numbers = all(isinstance(value, int | float) for value in values)
        at = values if numbers else [trial.values[key] for trial in done]
        axes.plot(at, [trial.loss for trial in done], "o")
        axes.plot([at[done.index(best)]], [best.loss], "o", markersize=12, fillstyle="none")
        if numbers and min(values) > 0 and max(values) / min(values) >= LOG_RATIO:
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("evaluation loss, nats a token")
    figure.savefig(folder / PICTURE, dpi=110)


def _around(recipe: Recipe) -> Space:
    """What matters most: the learning rate and the rank."""
    rate = recipe.train.learning_rate
    rates = Range(low=rate / DEFAULT_FACTOR, high=min(1.0, rate * DEFAULT_FACTOR), whole=False)
    return Space(grid={"train.lora.rank": tuple(map(_text, DEFAULT_RANKS))}, ranges={"train.learning_rate": rates})


def _choices(text: str) -> tuple[str, tuple[str, ...]]:
    key, values = _split(text, "--grid", "train.learning_rate=1e-4,2e-4")
    found = _yaml(f"[{values}]", f"--grid {text}")
    if not isinstance(found, list) or not found:
        raise RecipeError(f"--grid {text} names no value; write such as train.learning_rate=1e-4,2e-4")
    return key, tuple(dict.fromkeys(map(_text, found)))


def _range(text: str) -> tuple[str, Range]:
    key, values = _split(text, "--range", "train.learning_rate=1e-5..1e-3")
    low, dots, high = values.partition("..")
    ends = [_yaml(end, f"--range {text}") for end in (low, high)]
    if not dots or not all(isinstance(end, int | float) and math.isfinite(end) for end in ends) or ends[0] >= ends[1]:
        raise RecipeError(f"--range {text}: write a lowest and a highest number, such as {key}=1e-5..1e-3")
    return key, Range(low=ends[0], high=ends[1], whole=all(isinstance(end, int) for end in ends))


def _split(text: str, option: str, example: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise RecipeError(f"{option} {text}: write a dotted key and values, such as {example}")
    return key.strip(), values


def _yaml(text: str, what: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(f"{what} is not YAML: {' '.join(str(error).split())}") from None


def _text(value: object) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)
