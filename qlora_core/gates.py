"""Whether a candidate may become champion: a pure function of scores and rules."""

from collections.abc import Sequence

from qlora_core.artifacts import GateResult, PromotionDecision, Scores
from qlora_core.recipe import Gate

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "forgetting_perplexity", "latency_s"})
"""Every metric that is not here is better when it is higher, unless its gate says otherwise."""


def decide(gates: Sequence[Gate], candidate: Scores, base: Scores, champion: Scores | None) -> PromotionDecision:
    """Ask every gate. A missing metric fails its gate; a gate against a champion that does not exist passes.

    All scores must come from the same rows; the caller evaluates the champion again when they do not.
    """
    results = tuple(_ask(gate, candidate, base, champion) for gate in gates)
    failed = [result for result in results if not result.passed]
    if failed:
        names = ", ".join(f"{result.metric} against {result.against}" for result in failed)
        reason = f"{len(failed)} of {len(results)} gates failed: {names}"
    else:
        reason = f"all {len(results)} gates passed" + ("" if champion else "; there was no champion to compare with")
    return PromotionDecision(promote=not failed, gates=results, reason=reason)


def _ask(gate: Gate, candidate: Scores, base: Scores, champion: Scores | None) -> GateResult:
    value = candidate.get(gate.metric)
    if gate.threshold is not None:
        return _judge(gate, "threshold", value, gate.threshold, strict=False)
    if gate.against == "champion":
        if champion is None:
            return GateResult(
                metric=gate.metric,
                against="champion",
                value=value,
                reference=None,
                required="better than the champion",
                passed=True,
                reason="no champion yet",
            )
        return _judge(gate, "champion", value, champion.get(gate.metric), strict=gate.tolerance == 0)
    return _judge(gate, "base", value, base.get(gate.metric), strict=gate.tolerance == 0)


def _judge(gate: Gate, against: str, value: float | None, reference: float | None, strict: bool) -> GateResult:
    lower = (gate.direction or ("lower" if gate.metric in LOWER_IS_BETTER else "higher")) == "lower"
    sign = ("<" if lower else ">") + ("" if strict else "=")
    limit = None if reference is None else reference + abs(reference) * gate.tolerance * (1 if lower else -1)
    required = f"{sign} {against}" if limit is None else f"{sign} {limit:.4g}"
    if value is None or limit is None:
        missing = "the candidate" if value is None else f"the {against}"
        passed, reason = False, f"{missing} has no score named {gate.metric}; add it to evaluation.metrics"
    else:
        passed = _compare(value, limit, lower, strict)
        reason = f"{value:.4g} {'meets' if passed else 'does not meet'} {required}"
    return GateResult.model_validate(
        {
            "metric": gate.metric,
            "against": against,
            "value": value,
            "reference": reference,
            "required": required,
            "passed": passed,
            "reason": reason,
        }
    )


def _compare(value: float, limit: float, lower: bool, strict: bool) -> bool:
    """NaN compares false with everything, so a score that is not a number never passes."""
    if lower:
        return value < limit if strict else value <= limit
    return value > limit if strict else value >= limit
