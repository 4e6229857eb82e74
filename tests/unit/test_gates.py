import math

import pytest
from pydantic import ValidationError

from qlora_core.artifacts import Differences, GateResult, Interval
from qlora_core.gates import decide
from qlora_core.recipe import Gate


def ask(gate: Gate, candidate: float | None, base: float | None = None, champion: float | None = None) -> GateResult:
    """The verdict of one gate on scores of its own metric; a champion of None does not exist."""

    def scores(value: float | None) -> dict[str, float]:
        return {} if value is None else {gate.metric: value}

    decision = decide([gate], scores(candidate), scores(base), None if champion is None else scores(champion))
    assert decision.promote == decision.gates[0].passed
    return decision.gates[0]


def test_a_lower_loss_than_the_base_passes_and_an_equal_one_does_not() -> None:
    gate = Gate(metric="loss", against="base")
    assert ask(gate, 0.5, base=0.6).passed
    assert not ask(gate, 0.6, base=0.6).passed
    assert not ask(gate, 0.7, base=0.6).passed


def test_a_share_is_better_when_it_is_higher() -> None:
    gate = Gate(metric="valid_call", against="champion")
    assert ask(gate, 0.8, champion=0.7).passed
    assert not ask(gate, 0.7, champion=0.7).passed


@pytest.mark.parametrize(("candidate", "passed"), [(21.0, True), (21.99, True), (22.0, True), (22.01, False)])
def test_a_tolerance_lets_a_score_be_that_much_worse_and_no_more(candidate: float, passed: bool) -> None:
    assert ask(Gate(metric="perplexity", against="base", tolerance=0.1), candidate, base=20.0).passed is passed


def test_a_tolerance_on_a_negative_score_is_a_share_of_its_size() -> None:
    gate = Gate(metric="log_likelihood", against="base", tolerance=0.1, direction="higher")
    result = ask(gate, -10.9, base=-10.0)
    assert result.passed
    assert result.limit == pytest.approx(-11.0)


def test_a_threshold_itself_is_good_enough() -> None:
    gate = Gate(metric="exact_call", threshold=0.4)
    assert ask(gate, 0.4).passed
    assert not ask(gate, 0.399).passed


def test_a_score_of_unknown_direction_fails_its_gate_and_says_what_to_set() -> None:
    result = ask(Gate(metric="ours_word_perplexity", against="base"), 30.0, base=20.0)
    assert not result.passed
    assert "better lower or higher; give the gate a `direction`" in result.reason


def test_the_direction_that_the_harness_gives_is_used() -> None:
    gate = Gate(metric="ours_word_perplexity", against="champion")
    scores = ({gate.metric: 30.0}, {}, {gate.metric: 20.0})
    assert not decide([gate], *scores, directions={gate.metric: "lower"}).promote
    assert decide([gate], *scores, directions={gate.metric: "higher"}).promote
    otherwise = Gate(metric=gate.metric, against="champion", direction="higher")
    assert decide([otherwise], *scores, directions={gate.metric: "lower"}).promote


def test_a_direction_in_the_gate_overrules_the_table() -> None:
    assert ask(Gate(metric="answer_tokens", threshold=50, direction="lower"), 40).passed
    assert not ask(Gate(metric="answer_tokens", threshold=50, direction="lower"), 60).passed


def test_a_gate_against_a_champion_that_does_not_exist_passes_and_says_so() -> None:
    result = ask(Gate(metric="loss", against="champion"), 0.5)
    assert (result.passed, result.reason, result.reference) == (True, "no champion yet", None)


@pytest.mark.parametrize("against", ["base", "champion"])
def test_a_score_that_the_reference_lacks_fails_its_gate_by_name(against: str) -> None:
    gate = Gate.model_validate({"metric": "exact_call", "against": against})
    result = decide([gate], {"exact_call": 1.0}, {}, {}).gates[0]
    assert not result.passed
    assert f"the {against} has no score named exact_call" in result.reason


def test_a_score_that_the_candidate_lacks_fails_its_gate() -> None:
    result = ask(Gate(metric="bleu", threshold=0.0), None)
    assert not result.passed
    assert "the candidate has no score named bleu" in result.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["loss", "valid_call"])
def test_a_score_that_is_no_finite_number_never_passes(metric: str, value: float) -> None:
    assert not ask(Gate(metric=metric, threshold=0.5), value).passed
    assert not ask(Gate(metric=metric, against="base"), 0.5, base=value).passed


def test_one_failed_gate_stops_a_promotion_and_is_named() -> None:
    gates = [Gate(metric="loss", against="base"), Gate(metric="valid_call", threshold=0.8)]
    decision = decide(gates, {"loss": 0.1, "valid_call": 0.7}, {"loss": 0.9}, None)
    assert not decision.promote
    assert decision.reason == "1 of 2 gates failed: valid_call against the threshold 0.8"


def test_a_promotion_without_champion_says_that_there_was_none() -> None:
    decision = decide([Gate(metric="loss", against="base")], {"loss": 0.1}, {"loss": 0.9}, None)
    assert decision.promote
    assert decision.reason == "1 gate of 1 passed; there was no champion to compare with"


def test_a_recipe_without_gates_promotes_and_says_why() -> None:
    assert decide([], {"loss": 0.1}, {"loss": 0.9}, {"loss": 0.2}).reason == "the recipe has no gates"


def test_a_reason_gives_the_value_the_rule_and_where_the_rule_comes_from() -> None:
    result = ask(Gate(metric="forgetting_perplexity", against="base", tolerance=0.05), 24.9, base=20.3)
    assert result.reason == "24.9 does not meet <= 21.32 (within 5 % of the base's 20.3)"


def ask_surely(candidate: float, base: float, low: float, high: float, **keys: object) -> GateResult:
    """A gate on a loss that asks for significance, with the interval of the difference."""
    gate = Gate.model_validate({"metric": "loss", "against": "base", "significant": True, **keys})
    differences: Differences = {"base": {"loss": Interval(low=low, high=high)}}
    return decide([gate], {"loss": candidate}, {"loss": base}, None, differences).gates[0]


def test_a_significant_gate_passes_only_if_the_worse_end_of_the_interval_does() -> None:
    assert ask_surely(0.5, 0.6, low=-0.15, high=-0.05).significant is True
    doubtful = ask_surely(0.5, 0.6, low=-0.25, high=0.05)
    assert (doubtful.passed, doubtful.significant) == (False, False)
    assert "but not significantly (95 % interval of the difference -0.25 to +0.05)" in doubtful.reason


def test_a_significant_gate_with_a_tolerance_asks_that_it_is_surely_not_much_worse() -> None:
    assert ask_surely(0.61, 0.6, low=-0.01, high=0.05, tolerance=0.1).passed
    assert not ask_surely(0.61, 0.6, low=-0.01, high=0.07, tolerance=0.1).passed


def test_a_score_that_is_better_the_higher_is_judged_by_the_lower_end() -> None:
    gate = Gate(metric="valid_call", against="champion", significant=True)
    scores = ({"valid_call": 0.8}, {}, {"valid_call": 0.6})
    for low, passed in ((0.01, True), (-0.01, False)):
        differences: Differences = {"champion": {"valid_call": Interval(low=low, high=0.4)}}
        assert decide([gate], *scores, differences).promote is passed


def test_a_significant_gate_without_an_interval_fails_and_says_why() -> None:
    result = ask(Gate(metric="latency_s", against="base", significant=True), 0.5, base=0.9)
    assert not result.passed
    assert "this score has no interval over rows" in result.reason


def test_a_significant_threshold_is_refused_by_the_recipe() -> None:
    with pytest.raises(ValidationError, match="`significant` needs `against: base"):
        Gate(metric="loss", threshold=0.5, significant=True)
