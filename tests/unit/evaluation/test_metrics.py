import pytest

from qlora_core.artifacts import LOWER_IS_BETTER
from qlora_core.errors import RecipeError
from qlora_core.evaluation.metrics import METRICS, SCORES, find_metrics, known_metrics, same_value, score_answer

EXPECTED = '{"name": "add", "arguments": {"a": 1, "b": [2, 3]}}'


def tool_call(answer: str, expected: str = EXPECTED) -> tuple[float, float]:
    scores = score_answer(find_metrics(["tool_call"]), expected, answer)
    return scores["valid_call"], scores["exact_call"]


def test_a_call_with_the_same_name_and_arguments_is_exact_whatever_its_spacing_and_order() -> None:
    assert tool_call('{"arguments":{"b":[2,3.0],"a":1},"name":"add"}\n') == (1, 1)


def test_a_call_of_the_right_function_with_other_arguments_is_valid_but_not_exact() -> None:
    assert tool_call('{"name": "add", "arguments": {"a": 1, "b": [3, 2]}}') == (1, 0)
    assert tool_call('{"name": "add", "arguments": {"a": true, "b": [2, 3]}}') == (1, 0)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, I can add these.",
        '{"name": "subtract", "arguments": {"a": 1, "b": [2, 3]}}',
        '{"name": "add"}',
        '{"name": "add", "arguments": "a=1"}',
        '{"name": "add", "arguments": {"a": NaN}}',
        '[{"name": "add", "arguments": {}}]',
        'Here it is: {"name": "add", "arguments": {}}',
        '{"name": "add", "arguments": {}} and more',
        "[" * 100_000,
    ],
)
def test_anything_else_is_no_valid_call(answer: str) -> None:
    assert tool_call(answer) == (0, 0)


def test_a_row_that_expects_no_call_is_never_a_valid_one() -> None:
    assert tool_call(EXPECTED, expected="It is five.") == (0, 0)


@pytest.mark.parametrize(("answer", "valid"), [("{}", 1), ("null", 1), (" [1] ", 1), ("{'a': 1}", 0), ("", 0)])
def test_json_is_valid_as_the_specification_says(answer: str, valid: float) -> None:
    assert score_answer(find_metrics(["json_valid"]), "", answer) == {"json_valid": valid}


def test_an_exact_match_ignores_nothing_but_the_space_around() -> None:
    metrics = find_metrics(["exact_match"])
    assert score_answer(metrics, "Oslo", " Oslo\n") == {"exact_match": 1}
    assert score_answer(metrics, "Oslo", "oslo") == {"exact_match": 0}


def test_numbers_are_equal_by_value_and_truth_is_no_number() -> None:
    assert same_value({"a": [1, None]}, {"a": [1.0, None]})
    assert not same_value(1, True)
    assert not same_value([0], [False])
    assert not same_value({"a": 1}, {"a": 1, "b": 1})


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="names `tool_cal`, which is no metric; did you mean `tool_call`"):
        find_metrics(["loss", "tool_cal"])
    with pytest.raises(RecipeError, match="allowed: loss, forgetting"):
        find_metrics(["zzz"])


def test_every_known_metric_can_be_found_and_says_how_its_scores_are_read() -> None:
    assert list(find_metrics(known_metrics())) == list(known_metrics())
    assert {score for metric in METRICS.values() for score in metric.scores} <= SCORES.keys()


def test_answer_metrics_give_exactly_the_scores_that_they_promise() -> None:
    for metric in METRICS.values():
        if metric.score_answer is not None:
            assert tuple(metric.score_answer(EXPECTED, EXPECTED)) == metric.scores


def test_the_report_and_the_gates_agree_on_which_way_is_better() -> None:
    lower = {name for name, score in SCORES.items() if score.lower_is_better}
    assert lower == LOWER_IS_BETTER & SCORES.keys()
