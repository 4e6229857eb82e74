import sys
from pathlib import Path

import pytest

from qlora_core.errors import EvaluationError, RecipeError
from qlora_core.evaluation.evaluate import decisive
from qlora_core.evaluation.metrics import (
    ENTRY_POINTS,
    METRICS,
    SCORES,
    check_metrics,
    find_metrics,
    known_metrics,
    make_scorer,
    same_value,
)
from qlora_core.gates import decide
from qlora_core.recipe import EvaluationRecipe, Gate, Harness

EXPECTED = '{"name": "add", "arguments": {"a": 1, "b": [2, 3]}}'


def score(metric: str, expected: str, answer: str, **keys: object) -> dict[str, float]:
    recipe = EvaluationRecipe.model_validate({"metrics": (metric,), **keys})
    return make_scorer(find_metrics(recipe.metrics), recipe)(expected, answer)


def tool_call(answer: str, expected: str = EXPECTED) -> tuple[float, float]:
    scores = score("tool_call", expected, answer)
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
    assert score("json_valid", "", answer) == {"json_valid": valid}


def test_an_exact_match_ignores_nothing_but_the_space_around() -> None:
    assert score("exact_match", "Oslo", " Oslo\n") == {"exact_match": 1}
    assert score("exact_match", "Oslo", "oslo") == {"exact_match": 0}


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


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.make is not None])
def test_answer_metrics_give_exactly_the_scores_that_they_promise(name: str) -> None:
    given = score(name, EXPECTED, EXPECTED, json_schema={"type": "object"})
    assert tuple(given) == METRICS[name].scores
    assert all(value in (1, pytest.approx(100)) for value in given.values())


def test_every_score_of_the_table_is_judged_the_way_the_report_colours_it() -> None:
    for name, known in SCORES.items():
        if known.lower_is_better is None:
            with pytest.raises(RecipeError, match=f"`{name}`, and nothing tells which way of it is better"):
                check(("tool_call",), metric=name, threshold=0.5)
        else:
            decision = decide([Gate(metric=name, against="base")], {name: 0.4}, {name: 0.5}, None)
            assert decision.promote is known.lower_is_better, name


SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("answer", "fits"), [('{"city": "Oslo"}', 1), ('{"city": 1}', 0), ("{}", 0), ("Oslo", 0), ('{"city": NaN}', 0)]
)
def test_an_answer_fits_the_recipes_schema_or_it_does_not(answer: str, fits: float) -> None:
    assert score("json_schema", "", answer, json_schema=SCHEMA) == {"schema_valid": fits}


def test_a_schema_metric_without_a_usable_schema_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"give the schema as `evaluation\.json_schema`"):
        score("json_schema", "", "{}")
    with pytest.raises(RecipeError, match="is no JSON schema"):
        score("json_schema", "", "{}", json_schema={"type": "strin"})


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that brings three metrics, two of them faulty."""
    (tmp_path / "our_metrics.py").write_text(
        "def words(expected, answer):\n    return {'words': len(answer.split())}\n"
        "def broken(expected, answer):\n    return 1 / 0\n"
    )
    info = tmp_path / "our_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-metrics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{ENTRY_POINTS}]\nwords = our_metrics:words\nbroken = our_metrics:broken\nmissing = our_metrics:nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("plugins")
def test_an_installed_package_adds_a_metric_by_an_entry_point() -> None:
    assert "words" in known_metrics()
    assert score("words", "", "one two three") == {"words": 3}


@pytest.mark.usefixtures("plugins")
def test_a_faulty_metric_of_a_package_is_named() -> None:
    with pytest.raises(RecipeError, match="`missing` cannot be loaded from our_metrics:nothing"):
        score("missing", "", "")
    with pytest.raises(EvaluationError, match=r"`broken`.*must return a mapping of score names to numbers"):
        score("broken", "", "")


def check(metrics: tuple[str, ...], **gate: object) -> None:
    check_metrics(EvaluationRecipe(metrics=metrics), [Gate.model_validate(gate)])


def test_a_gate_on_a_score_that_some_metric_gives_is_fine_even_on_loss_without_asking_for_it() -> None:
    check(("tool_call",), metric="exact_call", threshold=0.5)
    check(("tool_call",), metric="stops_by_itself", threshold=0.5)
    check(("tool_call",), metric="loss", against="base", significant=True)


@pytest.mark.parametrize(
    ("metrics", "score", "hint"),
    [
        (("loss",), "valid_call", "add `tool_call` to evaluation.metrics"),
        (("tool_call",), "valid_cal", "did you mean `valid_call`"),
        (("loss",), "stops_by_itself", "the recipe scores loss, perplexity, rounding_cost, token_accuracy"),
    ],
)
def test_a_gate_on_a_score_that_nobody_gives_is_refused(metrics: tuple[str, ...], score: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        check(metrics, metric=score, threshold=0.5)


def test_a_gate_cannot_ask_whether_a_time_is_significant() -> None:
    with pytest.raises(RecipeError, match="which a time has none of"):
        check(("latency",), metric="latency_s", against="base", significant=True)


@pytest.mark.usefixtures("plugins")
def test_a_gate_on_what_a_package_of_ones_own_scores_needs_a_direction() -> None:
    check(("words",), metric="words", threshold=3, direction="lower")
    with pytest.raises(RecipeError, match="`words`, and nothing tells which way of it is better; give the gate"):
        check(("words",), metric="words", threshold=3)


@pytest.mark.usefixtures("plugins")
def test_a_metric_of_unknown_scores_does_not_switch_off_the_checks_of_other_gates() -> None:
    with pytest.raises(RecipeError, match="which no metric of this recipe scores; add `tool_call`"):
        check(("words",), metric="valid_call", threshold=0.5)
    with pytest.raises(RecipeError, match="which a time has none of"):
        check(("words", "latency"), metric="latency_s", against="base", significant=True)
    with pytest.raises(RecipeError, match="or did you mean `perplexity`"):
        check(("words",), metric="perplexty", threshold=20)


def test_gates_on_tasks_of_the_harness_are_left_to_it_and_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_core.evaluation.metrics.find_spec", lambda _: True)
    (tmp_path / "ours.yaml").write_text("group: ours\ntask:\n  - ours_easy\n  - task: ours_hard\n")
    (tmp_path / "other.yml").write_text("task: 'spelling'\ninclude: ours.yaml\n")
    harness = Harness(folder=tmp_path, tasks=("ours",))
    recipe = EvaluationRecipe(metrics=("loss", "harness"), harness=harness)
    for score in ("ours_word_perplexity", "ours_hard_acc", "spelling_acc"):
        check_metrics(recipe, [Gate(metric=score, threshold=0.5)])
    for score, hint in (("lose", "did you mean `loss`"), ("valid_call", "add `tool_call`"), ("mmlu_acc", "the recipe")):
        with pytest.raises(RecipeError, match=hint):
            check_metrics(recipe, [Gate(metric=score, threshold=0.5)])


def test_the_harness_is_refused_without_its_section_its_folder_or_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    harness = Harness(folder=tmp_path, tasks=("ours",))
    elsewhere = Harness(folder=tmp_path / "none", tasks=("ours",))
    for keys, message in (
        ({"metrics": ("harness",)}, "go together"),
        ({"metrics": ("loss",), "harness": harness}, "go together"),
        ({"metrics": ("harness",), "harness": elsewhere}, "there is no folder"),
        ({"metrics": ("harness",), "harness": harness}, r"pip install 'qlora-flows\[eval\]'"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_metrics(EvaluationRecipe.model_validate(keys), [])


def test_what_is_in_the_files_of_the_harness_decides_scores_and_not_where_they_are(tmp_path: Path) -> None:
    def part(folder: str, text: str) -> dict[str, object]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "ours.yaml").write_text(text)
        return decisive(EvaluationRecipe(harness=Harness(folder=tmp_path / folder, tasks=("ours",))))

    assert part("here", "task: ours") == part("there", "task: ours")
    assert part("here", "task: ours") != part("there", "task: ours, and more")
