"""Whether a candidate may become champion: a pure function of scores, their intervals and rules."""

import math
from collections.abc import Sequence
from typing import Literal

from qlora_core.artifacts import (
    Differences,
    Direction,
    Directions,
    GateResult,
    Interval,
    PromotionDecision,
    Scores,
)
from qlora_core.recipe import Gate
from qlora_core.scores import direction_of

Against = Literal["base", "champion", "threshold"]


def decide(
    gates: Sequence[Gate],
    candidate: Scores,
    base: Scores,
    champion: Scores | None,
    differences: Differences | None = None,
    directions: Directions | None = None,
) -> PromotionDecision:
    """Ask every gate. A missing metric, or one of unknown direction, fails its gate.

    A gate against a champion that does not exist passes.

    All scores must come from the same rows; the caller evaluates the champion again when they do not.

    Args:
        gates: the rules, in the order in which they are reported.
        candidate: its scores.
        base: the base model's.
        champion: those of the model that serves now, if there is one.
        differences: intervals of the candidate's scores minus the others', for gates that ask for significance.
        directions: of scores that the table does not know, as whoever scored them says.
    """
    asked = [gate if gate.direction else _directed(gate, directions or {}) for gate in gates]
    results = tuple(_ask(gate, candidate, base, champion, differences or {}) for gate in asked)
    failed = [result for result in results if not result.passed]
    if failed:
        names = ", ".join(f"{result.metric} against {_name(result)}" for result in failed)
        reason = f"{len(failed)} of {_count(results)} failed: {names}"
    else:
        reason = f"{_count(results)} of {len(results)} passed" if results else "the recipe has no gates"
        reason += "" if champion is not None else "; there was no champion to compare with"
    return PromotionDecision(promote=not failed, gates=results, reason=reason)


def _directed(gate: Gate, directions: Directions) -> Gate:
    """The gate with the direction of its score, if anybody knows it."""
    direction: Direction | None = direction_of(gate.metric) or directions.get(gate.metric)
    return gate.model_copy(update={"direction": direction})


def _ask(gate: Gate, candidate: Scores, base: Scores, champion: Scores | None, differences: Differences) -> GateResult:
    if gate.threshold is not None:
        return _judge(gate, "threshold", candidate, gate.threshold, None)
    if gate.against == "base":
        interval = differences.get("base", {}).get(gate.metric)
        return _judge(gate, "base", candidate, base.get(gate.metric), interval)
    if champion is not None:
        interval = differences.get("champion", {}).get(gate.metric)
        return _judge(gate, "champion", candidate, champion.get(gate.metric), interval)
    return GateResult(
        metric=gate.metric,
        against="champion",
        value=candidate.get(gate.metric),
        reference=None,
        required="better than the champion",
        passed=True,
        reason="no champion yet",
    )


def _judge(
    gate: Gate, against: Against, candidate: Scores, reference: float | None, interval: Interval | None
) -> GateResult:
    value = candidate.get(gate.metric)
    lower = gate.direction == "lower"
    strict = against != "threshold" and gate.tolerance == 0
    sign = ("<" if lower else ">") + ("" if strict else "=")
    limit = None if reference is None else reference + abs(reference) * gate.tolerance * (1 if lower else -1)
    required = f"{sign} {against}" if limit is None else f"{sign} {limit:.4g}"
    passed, significant = False, None
    if value is None or reference is None or limit is None:
        missing = "the candidate" if value is None else f"the {against}"
        reason = f"{missing} has no score named {gate.metric}; add its metric to evaluation.metrics"
    elif gate.direction is None:
        required, limit = f"better than {against}", None
        reason = f"nothing tells whether {gate.metric} is better lower or higher; give the gate a `direction`"
    else:
        passed = _passes(value, limit, lower, strict)
        reason = _explain(gate, against, value, reference, required, passed)
        if gate.significant and passed:
            worst = math.nan if interval is None else reference + (interval.high if lower else interval.low)
            significant = passed = _passes(worst, limit, lower, strict)
            reason += _doubt(interval, significant)
    return GateResult(
        metric=gate.metric,
        against=against,
        value=value,
        reference=reference,
        limit=limit,
        required=required,
        significant=significant,
        passed=passed,
        reason=reason,
    )


def _passes(value: float, limit: float, lower: bool, strict: bool) -> bool:
    """A score that is not a finite number never passes."""
    if not (math.isfinite(value) and math.isfinite(limit)):
        return False
    if value == limit:
        return not strict
    return (value < limit) == lower


def _explain(gate: Gate, against: Against, value: float, reference: float, required: str, passed: bool) -> str:
    if not math.isfinite(value):
        return f"the candidate's score is {value}, which no gate accepts"
    allowance = f"within {100 * gate.tolerance:g} % of " if gate.tolerance else ""
    origin = "" if against == "threshold" else f" ({allowance}the {against}'s {reference:.4g})"
    return f"{value:.4g} {'meets' if passed else 'does not meet'} {required}{origin}"


def _doubt(interval: Interval | None, significant: bool) -> str:
    if interval is None:
        return ", but nothing says how sure that is: this score has no interval over rows"
    word = "significantly" if significant else "but not significantly"
    return f", {word} (95 % interval of the difference {interval.low:+.3g} to {interval.high:+.3g})"


def _name(result: GateResult) -> str:
    return f"the threshold {result.limit:.4g}" if result.against == "threshold" else f"the {result.against}"


def _count(results: Sequence[GateResult]) -> str:
    return f"{len(results)} gate{'' if len(results) == 1 else 's'}"
