"""The table of metrics: what a recipe may name, what each needs, and the scores that it gives.

Task metrics look at one answer and the text that was expected, and say one number per score and row; a model's score
is the mean over rows. `expected` of a tool call is `{"name": ..., "arguments": {...}}`.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from qlora_core.errors import RecipeError

RowScores = dict[str, float]


class Metric(NamedTuple):
    """One name that `evaluation.metrics` may hold."""

    needs: Literal["loss", "forgetting", "answers"]
    scores: tuple[str, ...]
    score_answer: Callable[[str, str], RowScores] | None = None
    """`(expected, answer)` to one value per score, for metrics that need answers."""


class Score(NamedTuple):
    """How people read one score."""

    title: str
    unit: Literal["share", "number"] = "number"
    lower_is_better: bool | None = False
    """None: neither way is better."""


SCORES: dict[str, Score] = {
    "loss": Score("Loss", lower_is_better=True),
    "perplexity": Score("Perplexity", lower_is_better=True),
    "token_accuracy": Score("Next token right", "share"),
    "forgetting_perplexity": Score("Perplexity on other text", lower_is_better=True),
    "valid_call": Score("Valid tool calls", "share"),
    "exact_call": Score("Exact tool calls", "share"),
    "exact_match": Score("Exact answers", "share"),
    "json_valid": Score("Valid JSON", "share"),
    "stops_by_itself": Score("Answers that end by themselves", "share"),
    "answer_tokens": Score("Answer length in tokens", lower_is_better=None),
    "generation_tokens_per_s": Score("Generated tokens per second", lower_is_better=None),
}


def describe(score: str) -> Score:
    """How people read a score; one that the table does not know is shown under its own name."""
    return SCORES.get(score) or Score(score.replace("_", " ").capitalize())


def known_metrics() -> tuple[str, ...]:
    """Every name that `evaluation.metrics` may hold."""
    return tuple(METRICS)


def find_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics that a recipe names.

    Raises:
        RecipeError: one of them does not exist.
    """
    found = {}
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(METRICS)}"
            raise RecipeError(f"evaluation.metrics names `{name}`, which is no metric; {hint}")
        found[name] = METRICS[name]
    return found


def score_answer(metrics: Mapping[str, Metric], expected: str, answer: str) -> RowScores:
    """One row's values of every metric that looks at answers."""
    values: RowScores = {}
    for metric in metrics.values():
        if metric.score_answer is not None:
            values.update(metric.score_answer(expected, answer))
    return values


def parse_json(text: str) -> Any:
    """The value of a JSON text, or None if it is none; `NaN` and `Infinity` are not JSON (RFC 8259)."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def same_value(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal: `1` equals `1.0`, but `true` does not equal `1`."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_value(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_value, left, right))
    return bool(left == right)


def _json_valid(_expected: str, answer: str) -> RowScores:
    return {"json_valid": float(parse_json(answer) is not None or answer.strip() == "null")}


def _exact_match(expected: str, answer: str) -> RowScores:
    return {"exact_match": float(expected.strip() == answer.strip())}


def _tool_call(expected: str, answer: str) -> RowScores:
    """Valid: a JSON object with the expected function's name and an object of arguments; exact: these equal too."""
    wanted, given = _call(expected), _call(answer)
    valid = given is not None and wanted is not None and given[0] == wanted[0]
    return {"valid_call": float(valid), "exact_call": float(valid and same_value(given, wanted))}


def _call(text: str) -> list[Any] | None:
    """Name and arguments of a call, or None if the text is no call."""
    value = parse_json(text)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments")
    return [value["name"], arguments] if isinstance(arguments, dict) else None


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", ("loss", "perplexity", "token_accuracy")),
    "forgetting": Metric("forgetting", ("forgetting_perplexity",)),
    "exact_match": Metric("answers", ("exact_match",), _exact_match),
    "json_valid": Metric("answers", ("json_valid",), _json_valid),
    "tool_call": Metric("answers", ("valid_call", "exact_call"), _tool_call),
}
