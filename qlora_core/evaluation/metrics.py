"""The table of metrics: what a recipe may name, what each needs, and the scores that it gives.

Most metrics look at one answer and the text that was expected, and say one number per score and row; a model's score
is the mean over rows. `expected` of a tool call is `{"name": ..., "arguments": {...}}`.

A package of one's own adds a metric by an entry point in the group `qlora_flows.metrics`: its name is the metric's, and
it loads a function `(expected, answer)` that returns a mapping of score names to numbers.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from qlora_core.errors import EvaluationError, RecipeError
from qlora_core.evaluation.records import AnswerScorer, RowScores
from qlora_core.recipe import EvaluationRecipe, Gate
from qlora_core.scores import SCORES as SCORES
from qlora_core.scores import Score as Score
from qlora_core.scores import describe as describe
from qlora_core.scores import direction_of

ENTRY_POINTS = "qlora_flows.metrics"
TASK_NAME = re.compile(r"^(?:- |\s)*(?:task|group): *[\"']?([\w.-]+)", re.MULTILINE)
"""What a YAML file of the lm-evaluation-harness defines."""

Need = Literal["loss", "forgetting", "answers", "choices", "latency", "harness"]


class Metric(NamedTuple):
    """One name that `evaluation.metrics` may hold."""

    needs: Need
    scores: tuple[str, ...]
    """Names of its scores; empty if only its answers tell."""
    make: Callable[[EvaluationRecipe], AnswerScorer] | None = None
    """For metrics that need answers: what scores them."""


ROUNDING_COST = "rounding_cost"
"""A score of the candidate alone, from its merge: nats a token."""
ABOUT_ANSWERS = {"stops_by_itself", "answer_tokens", "generation_tokens_per_s"}
"""What is known of every model that gave answers, whichever metric asked for them."""
TIMED = {"generation_tokens_per_s", "latency_s"}
"""Scores that are not sums over rows, so that rows say nothing about how sure they are."""


def known_metrics() -> tuple[str, ...]:
    """Every name that `evaluation.metrics` may hold, those of installed packages included."""
    return (*METRICS, *(name for name in _plugins() if name not in METRICS))


def find_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics that a recipe names.

    Raises:
        RecipeError: one of them does not exist.
    """
    found, plugins = {}, _plugins()
    for name in names:
        if name in METRICS:
            found[name] = METRICS[name]
        elif name in plugins:
            found[name] = _from_plugin(plugins[name])
        else:
            known = known_metrics()
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(known)}"
            raise RecipeError(f"evaluation.metrics names `{name}`, which is no metric; {hint}")
    return found


def check_metrics(recipe: EvaluationRecipe, gates: Iterable[Gate]) -> None:
    """Whether every metric can be scored here and every gate will find its score, before anything is computed.

    Raises:
        RecipeError: a metric does not exist or lacks a package or a key, or a gate asks for what nobody scores.
    """
    metrics = find_metrics(recipe.metrics)
    make_scorer(metrics, recipe)
    _check_harness(recipe)
    scored = {
        ROUNDING_COST,
        *METRICS["loss"].scores,
        *(score for metric in metrics.values() for score in metric.scores),
    }
    if any(metric.needs == "answers" for metric in metrics.values()):
        scored |= ABOUT_ANSWERS
    tasks = _tasks_of_harness(recipe)
    # What a package of one's own scores is known only from its answers.
    others = any(metric.needs == "answers" and not metric.scores for metric in metrics.values())
    for gate in gates:
        of_harness = gate.metric.startswith(tuple(f"{task}_" for task in tasks))
        if gate.metric not in scored and not of_harness and (gate.metric in SCORES or not others):
            raise RecipeError(_unscored(gate.metric, scored))
        if gate.metric == ROUNDING_COST and gate.threshold is None:
            raise RecipeError(
                f"the gate on `{ROUNDING_COST}` compares with the {gate.against}, which was not merged here; "
                "give it a `threshold` in nats, such as 0.01"
            )
        if gate.direction is None and direction_of(gate.metric) is None and not of_harness:
            raise RecipeError(_undirected(gate.metric, scored))
        if gate.significant and gate.metric in TIMED:
            raise RecipeError(
                f"the gate on `{gate.metric}` asks for significance, which a time has none of; give it a `tolerance`"
            )


def _check_harness(recipe: EvaluationRecipe) -> None:
    harness = recipe.harness
    if (harness is None) == ("harness" in recipe.metrics):
        raise RecipeError("`harness` in evaluation.metrics and the section `evaluation.harness` go together")
    if harness is None:
        return
    if not harness.folder.is_dir():
        raise RecipeError(f"evaluation.harness.folder: there is no folder {harness.folder}")
    if find_spec("lm_eval") is None:
        raise RecipeError("the metric `harness` needs the lm-evaluation-harness: pip install 'qlora-flows[eval]'")


def _tasks_of_harness(recipe: EvaluationRecipe) -> set[str]:
    """Tasks and groups that the harness may score: those that the recipe names, and what their files define."""
    if recipe.harness is None:
        return set()
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in recipe.harness.folder.rglob("*.y*ml"))
    return {*recipe.harness.tasks, *(name for text in texts for name in TASK_NAME.findall(text))}


def _undirected(score: str, scored: set[str]) -> str:
    near = difflib.get_close_matches(score, scored, n=1)
    hint = f", or did you mean `{near[0]}`?" if near and near[0] != score else ""
    return (
        f"a gate asks for `{score}`, and nothing tells which way of it is better; give the gate `direction: lower` or "
        f"`direction: higher`{hint}"
    )


def _unscored(score: str, scored: set[str]) -> str:
    makers = [name for name, metric in METRICS.items() if score in metric.scores]
    near = difflib.get_close_matches(score, scored, n=1)
    if makers:
        hint = f"add `{makers[0]}` to evaluation.metrics"
    else:
        hint = f"did you mean `{near[0]}`?" if near else f"the recipe scores {', '.join(sorted(scored))}"
    return f"a gate asks for `{score}`, which no metric of this recipe scores; {hint}"


def make_scorer(metrics: Mapping[str, Metric], recipe: EvaluationRecipe) -> AnswerScorer:
    """One function for all metrics that look at answers.

    Raises:
        RecipeError: a metric lacks a package, or a key of the recipe.
    """
    scorers = [metric.make(recipe) for metric in metrics.values() if metric.make is not None]

    def score(expected: str, answer: str) -> RowScores:
        return {name: value for scorer in scorers for name, value in scorer(expected, answer).items()}

    return score


def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _from_plugin(entry: EntryPoint) -> Metric:
    def make(_: EvaluationRecipe) -> AnswerScorer:
        try:
            function = entry.load()
        except Exception as error:
            raise RecipeError(f"the metric `{entry.name}` cannot be loaded from {entry.value}: {error}") from error

        def score(expected: str, answer: str) -> RowScores:
            try:
                return {str(name): float(value) for name, value in function(expected, answer).items()}
            except Exception as error:
                raise EvaluationError(
                    f"the metric `{entry.name}` ({entry.value}) failed on the answer {answer[:80]!r}: {error!r}; "
                    "it must return a mapping of score names to numbers"
                ) from error

        return score

    return Metric("answers", (), make)


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


def _json_schema(recipe: EvaluationRecipe) -> AnswerScorer:
    """Whether an answer is JSON that fits the recipe's schema (JSON Schema 2020-12, unless it names another)."""
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    if recipe.json_schema is None:
        raise RecipeError("evaluation.metrics names `json_schema`; give the schema as `evaluation.json_schema`")
    kind = validator_for(recipe.json_schema, default=Draft202012Validator)
    try:
        kind.check_schema(recipe.json_schema)
    except SchemaError as error:
        raise RecipeError(f"evaluation.json_schema is no JSON schema: {error.message}") from None
    validator = kind(recipe.json_schema, registry=Registry())  # one that fetches nothing

    def score(_expected: str, answer: str) -> RowScores:
        valid = _json_valid("", answer)["json_valid"] == 1 and validator.is_valid(parse_json(answer))
        return {"schema_valid": float(valid)}

    return score


def _rouge(_: EvaluationRecipe) -> AnswerScorer:
    from qlora_core.evaluation.text_overlap import make_rouge

    return make_rouge()


def _bleu(_: EvaluationRecipe) -> AnswerScorer:
    from qlora_core.evaluation.text_overlap import make_bleu

    return make_bleu()


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", ("loss", "perplexity", "token_accuracy")),
    "forgetting": Metric("forgetting", ("forgetting_perplexity",)),
    "choice": Metric("choices", ("choice_accuracy",)),
    "latency": Metric("latency", ("latency_s",)),
    "harness": Metric("harness", ()),
    "exact_match": Metric("answers", ("exact_match",), lambda _: _exact_match),
    "json_valid": Metric("answers", ("json_valid",), lambda _: _json_valid),
    "json_schema": Metric("answers", ("schema_valid",), _json_schema),
    "tool_call": Metric("answers", ("valid_call", "exact_call"), lambda _: _tool_call),
    "rouge": Metric("answers", ("rouge_1", "rouge_2", "rouge_l"), _rouge),
    "bleu": Metric("answers", ("bleu",), _bleu),
}
