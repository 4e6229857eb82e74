import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qlora_core.artifacts import Differences, Interval, ModelScores, PreparedDataset, PromotionDecision, Scores
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.evaluate import ReportContext, compare, differences
from qlora_core.evaluation.examples import compare_answers
from qlora_core.evaluation.scored import ScoredAnswer
from qlora_core.evaluation.wording import format_energy, format_score, format_seconds, format_time
from qlora_core.gates import decide
from qlora_core.recipe import Gate

GATES = (Gate(metric="valid_call", against="base"), Gate(metric="loss", against="champion"))
BASE = {"loss": 0.85, "valid_call": 0.0, "answer_tokens": 67.0}
CANDIDATE = {"loss": 0.13, "valid_call": 0.8333, "answer_tokens": 27.0}
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
CONTEXT = ReportContext(
    title="Retraining of calls",
    recipe_name="calls",
    created="2026-01-02T03:04:05+00:00",
    lineage=(("base model", ATTACK),),
    timings_s={"train": 124.0},
)
MakeScores = Callable[[str, Scores, str], ModelScores]


@pytest.fixture
def make(tmp_path: Path, dataset: PreparedDataset) -> MakeScores:
    def make(name: str, scores: Scores, answer: str) -> ModelScores:
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            ScoredAnswer(
                row_id=f"row-{number}",
                question=f"Question {number} {ATTACK}",
                prompt="…",
                expected="the call",
                answer=answer,
                stopped=True,
                tokens=3,
                metrics={"valid_call": float(answer == "the call")},
                loss=0.5,
            ).model_dump_json()
            for number in range(10)
        ]
        (folder / "answers.jsonl").write_text("\n".join(lines))
        return ModelScores(
            path=folder, model_digest=name[0] * 64, data_digest=dataset.digest, scores=scores, rows=10, seed=17
        )

    return make


def decide_on(candidate: Scores, champion: Scores | None = None) -> PromotionDecision:
    return decide(GATES, candidate, BASE, champion)


class Page(HTMLParser):
    """What a browser would load or run, and what a person would read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.policy = ""
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given.get("content") or ""

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_page_opens_with_the_verdict_in_one_sentence(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    report = compare(base, candidate, None, decide_on(CANDIDATE), dataset, CONTEXT, tmp_path)
    words = Page((tmp_path / "report.html").read_text()).words
    assert "Promoted: valid tool calls rose from 0\u202f% to 83\u202f%." in words
    assert (report.base, report.candidate, report.champion, report.rows) == (BASE, CANDIDATE, None, 10)


def test_a_refusal_names_the_gate_that_failed_its_value_and_its_limit(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    champion_scores = {"loss": 0.1, "valid_call": 0.9, "answer_tokens": 20.0}
    base, candidate, champion = (
        make("base", BASE, "no"),
        make("candidate", CANDIDATE, "no"),
        make("hero", champion_scores, "the call"),
    )
    decision = decide_on(CANDIDATE, champion_scores)
    compare(base, candidate, champion, decision, dataset, CONTEXT, tmp_path)
    words = Page((tmp_path / "report.html").read_text()).words
    assert "Not promoted: loss reached 0.130 but must be below 0.100 (champion)." in words
    assert "Champion" in words


def test_a_candidate_that_a_person_has_to_approve_is_not_called_promoted(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    context = CONTEXT.model_copy(update={"needs_approval": True})
    compare(base, candidate, None, decide_on(CANDIDATE), dataset, context, tmp_path)
    words = " ".join(Page((tmp_path / "report.html").read_text()).words)
    assert "Passed its gates: valid tool calls rose from" in words
    assert "Promoted" not in words


def test_the_page_says_what_the_candidate_took(make: MakeScores, dataset: PreparedDataset, tmp_path: Path) -> None:
    curve = tmp_path / "curve.jsonl"
    speeds = [(1, 50.0, 3.0), (2, 1200.0, 3.5), (3, 1100.0, 3.2)]
    points = [
        {"step": n, "loss": 1.0, "tokens_per_s": speed, "peak_memory_gib": gib, "gpu_energy_j": 24_000.0}
        for n, speed, gib in speeds
    ]
    curve.write_text("\n".join(map(json.dumps, points)))
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    context = CONTEXT.model_copy(update={"curve": curve})
    compare(base, candidate, None, decide_on(CANDIDATE), dataset, context, tmp_path)
    words = " ".join(Page((tmp_path / "report.html").read_text()).words)
    for cost in (
        "Train 2 min 4 s",
        "Training steps 3",
        "per second, median 1,100",
        "Peak GPU memory 3.5 GiB",
        "in training 20 Wh",
    ):
        assert cost in re.sub(r"\s+", " ", words)


def test_the_page_is_one_file_that_loads_and_runs_nothing_even_when_data_tries_to(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    curve = tmp_path / "curve.jsonl"
    points = [{"step": n, "loss": 1 / n, "learning_rate": 1e-3 / n} for n in range(1, 100)]
    curve.write_text("\n".join(map(json.dumps, points)) + '\n{"step": 100, "lo')
    base, candidate = make("base", BASE, ATTACK), make("candidate", CANDIDATE, ATTACK)
    context = CONTEXT.model_copy(update={"curve": curve})
    compare(base, candidate, None, decide_on(CANDIDATE), dataset, context, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "a"})
    assert all(link.startswith("#") for link in page.links)
    assert page.policy.startswith("default-src 'none'")
    assert ATTACK in page.words


def test_the_page_shows_curves_and_histogram_in_the_colours_of_the_page(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    curve = tmp_path / "curve.jsonl"
    curve.write_text("\n".join(json.dumps({"step": n, "loss": 1 / n, "learning_rate": 1e-3}) for n in (1, 2, 3)))
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    context = CONTEXT.model_copy(update={"curve": curve})
    compare(base, candidate, None, decide_on(CANDIDATE), dataset, context, tmp_path)
    svgs = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), flags=re.DOTALL)
    labels = [re.search(r'aria-label="([^"]*)"', svg) for svg in svgs]
    assert [label[1] for label in labels if label] == [
        "Loss over training steps",
        "Learning rate over training steps",
        "Row lengths in tokens",
    ]
    for svg in svgs:
        assert "var(--first)" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_the_same_inputs_make_the_same_page(make: MakeScores, dataset: PreparedDataset, tmp_path: Path) -> None:
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        compare(base, candidate, None, decide_on(CANDIDATE), dataset, CONTEXT, tmp_path / name)
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_the_data_beside_the_page_holds_what_the_page_says(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    compare(base, candidate, None, decide_on(CANDIDATE), dataset, CONTEXT, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["decision"]["promote"] is True
    assert data["models"]["candidate"]["scores"] == CANDIDATE
    assert len(data["examples"]) == 8
    assert data["examples"][0]["change"] == "gained"


def test_a_score_that_json_cannot_write_becomes_null_in_the_data(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    ruined = CANDIDATE | {"loss": float("nan")}
    base, candidate = make("base", BASE, "no"), make("candidate", ruined, "no")
    compare(base, candidate, None, decide_on(ruined), dataset, CONTEXT, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["models"]["candidate"]["scores"]["loss"] is None


@pytest.mark.parametrize("change", [{"data_digest": "0" * 64}, {"seed": 18}, {"rows": 9}])
def test_models_that_saw_other_rows_are_not_compared(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path, change: dict[str, object]
) -> None:
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    with pytest.raises(EvaluationError, match="compare only on the same rows"):
        other = base.model_copy(update=change)
        compare(other, candidate, None, decide_on(CANDIDATE), dataset, CONTEXT, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("valid_call", 0.8333, "83.3\u202f%"),
        ("loss", 0.12996, "0.130"),
        ("perplexity", 25.0, "25.0"),
        ("perplexity", 123456.7, "123,457"),
        ("perplexity", float("inf"), "infinite"),
        ("loss", float("nan"), "not a number"),
        ("loss", None, "\u2013"),
    ],
)
def test_a_score_is_written_as_people_read_it(name: str, value: float | None, text: str) -> None:
    assert format_score(name, value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (42.4, "42 s"), (124, "2 min 4 s"), (3 * 3600 + 300, "3 h 5 min")]
)
def test_times_are_written_as_people_read_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_refusal_for_lack_of_certainty_says_so(make: MakeScores, dataset: PreparedDataset, tmp_path: Path) -> None:
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "no")
    gate = Gate(metric="valid_call", against="base", significant=True)
    unsure: Differences = {"base": {"valid_call": Interval(low=-0.1, high=0.9)}}
    decision = decide([gate], CANDIDATE, BASE, None, unsure)
    compare(base, candidate, None, decision, dataset, CONTEXT, tmp_path)
    doubt = "too few rows to be sure that this is above 0.0\u202f% (base)."
    words = Page((tmp_path / "report.html").read_text()).words
    assert f"Not promoted: valid tool calls reached 83.3\u202f%, {doubt}" in words


def answers(name: str, qualities: list[float]) -> list[ScoredAnswer]:
    return [
        ScoredAnswer(
            row_id=f"row-{number}",
            question="?",
            prompt="?",
            expected="!",
            answer=name,
            stopped=True,
            tokens=1,
            metrics={"valid_call": quality},
            loss=None,
        )
        for number, quality in enumerate(qualities)
    ]


def test_the_rows_that_the_candidate_lost_to_the_champion_come_first() -> None:
    comparison = compare_answers(
        {
            "base": answers("base", [0, 0, 0, 0, 0, 0]),
            "candidate": answers("candidate", [1, 1, 0, 0.5, 1, 0]),
            "champion": answers("champion", [1, 0, 1, 1, 0, 0]),
        },
        most=4,
    )
    assert (comparison.rival, comparison.better, comparison.worse, comparison.rows) == ("champion", 2, 2, 6)
    assert [example.row_id for example in comparison.examples] == ["row-2", "row-3", "row-0", "row-5"]


def test_examples_show_different_answers_before_they_repeat_one() -> None:
    base, candidate = answers("base", [0] * 4), answers("candidate", [1] * 4)
    candidate = [row.model_copy(update={"expected": text}) for row, text in zip(candidate, "aaba", strict=True)]
    comparison = compare_answers({"base": base, "candidate": candidate}, most=3)
    assert [example.expected for example in comparison.examples] == ["a", "b", "a"]


def test_without_a_champion_examples_show_what_the_base_did() -> None:
    comparison = compare_answers(
        {"base": answers("base", [0] * 10), "candidate": answers("candidate", [1] * 9 + [0])}, most=8
    )
    assert (comparison.rival, comparison.better, comparison.worse) == ("base", 9, 0)
    assert [example.change for example in comparison.examples] == ["gained"] * 7 + ["same"]


def test_intervals_in_the_report_are_those_that_gates_are_asked_with(
    make: MakeScores, dataset: PreparedDataset, tmp_path: Path
) -> None:
    base, candidate = make("base", BASE, "no"), make("candidate", CANDIDATE, "the call")
    report = compare(base, candidate, None, decide_on(CANDIDATE), dataset, CONTEXT, tmp_path)
    assert report.differences == differences(base, candidate, None)
    assert report.differences["base"]["valid_call"] == Interval(low=1, high=1)


def test_a_time_is_written_in_utc() -> None:
    assert format_time("2026-01-02T01:04:05+02:00") == "1 January 2026, 23:04 UTC"


@pytest.mark.parametrize(("joules", "text"), [(1_800.0, "0.5 Wh"), (45_000.0, "12 Wh"), (12_240_000.0, "3.4 kWh")])
def test_energy_reads_like_a_bill(joules: float, text: str) -> None:
    assert format_energy(joules) == text
