import json
import shutil
from pathlib import Path

import pytest

from qlora_core.artifacts import ModelScores, PreparedDataset
from qlora_core.errors import EvaluationError, RecipeError
from qlora_core.evaluation.evaluate import KEEP, evaluate
from qlora_core.evaluation.worker import run
from qlora_core.events import Metrics, Note, Progress, ignore
from qlora_core.modeling.rows import read_prompts
from qlora_core.recipe import EvaluationRecipe, Generation

RECIPE = EvaluationRecipe(metrics=("loss", "forgetting", "tool_call"), generation=Generation(max_new_tokens=8))


def score(
    recipe: EvaluationRecipe, model_path: Path, dataset: PreparedDataset, into: Path, seed: int = 17
) -> ModelScores:
    """The child's work without the child."""
    into.mkdir(exist_ok=True)
    spec = {"recipe": recipe, "seed": seed, "model_path": model_path, "model_digest": "m" * 64}
    return run({**spec, "dataset": dataset, "into": into}, ignore)


def test_a_model_is_scored_in_a_child_process_that_leaves_scores_and_answers(
    model_path: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    events: list[Metrics | Progress | Note] = []
    scores = evaluate(RECIPE, 17, model_path, "m" * 64, dataset, tmp_path, events.append)
    assert scores.rows == 5
    assert (scores.model_digest, scores.data_digest) == ("m" * 64, dataset.digest)
    assert set(scores.scores) >= {"loss", "perplexity", "token_accuracy", "forgetting_perplexity", "valid_call"}
    assert scores.scores["answer_tokens"] <= 8
    lines = {name: len((tmp_path / name).read_text().splitlines()) for name in KEEP if (tmp_path / name).exists()}
    assert lines == {"rows.jsonl": 5, "forgetting.jsonl": 2, "answers.jsonl": 5}
    answer = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    assert answer["question"] == "Roll a die."
    assert answer["metrics"] == {"valid_call": 0.0, "exact_call": 0.0}
    finished = {event.what for event in events if isinstance(event, Progress) and event.done == event.total}
    assert finished == {"evaluation rows", "other text", "answers"}


def test_answers_are_generated_only_when_a_metric_looks_at_them(
    model_path: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    scores = score(EvaluationRecipe(metrics=("loss",)), model_path, dataset, tmp_path)
    assert set(scores.scores) == {"loss", "perplexity", "token_accuracy"}
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_sample_of_rows_depends_on_the_seed_alone(model_path: Path, dataset: PreparedDataset, tmp_path: Path) -> None:
    recipe = EvaluationRecipe(metrics=("loss",), max_rows=2)
    picks = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert score(recipe, model_path, dataset, tmp_path / name, seed).rows == 2
        lines = (tmp_path / name / "rows.jsonl").read_text().splitlines()
        picks[name] = [json.loads(line)["row_id"] for line in lines]
    assert picks["a"] == picks["b"] != picks["c"]


def test_an_unknown_metric_is_refused_before_a_process_starts(dataset: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean `loss`"):
        evaluate(EvaluationRecipe(metrics=("los",)), 17, tmp_path / "none", "m" * 64, dataset, tmp_path, ignore)
    assert not (tmp_path / "child").exists()


def test_a_model_with_another_tokenizer_is_refused(model_path: Path, dataset: PreparedDataset, tmp_path: Path) -> None:
    other = dataset.model_copy(update={"tokenizer_digest": "0" * 64})
    with pytest.raises(EvaluationError, match="another tokenizer"):
        score(RECIPE, model_path, other, tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("forgetting.arrow", r"set `data\.forgetting`"), ("evaluation.arrow", r"set `data\.split\.evaluation_fraction`")],
)
def test_rows_that_are_not_there_are_asked_for_by_the_key_that_makes_them(
    model_path: Path, dataset: PreparedDataset, tmp_path: Path, missing: str, message: str
) -> None:
    shutil.copytree(dataset.path, tmp_path / "data")
    (tmp_path / "data" / missing).unlink()
    with pytest.raises(EvaluationError, match=message):
        score(RECIPE, model_path, dataset.model_copy(update={"path": tmp_path / "data"}), tmp_path / "into")


def test_choices_and_latency_are_scored_without_metrics_that_look_at_answers(
    model_path: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    recipe = EvaluationRecipe(metrics=("choice", "latency"), generation=Generation(max_new_tokens=3))
    scores = score(recipe, model_path, dataset, tmp_path).scores
    assert set(scores) == {"loss", "perplexity", "token_accuracy", "choice_accuracy", "latency_s"}
    assert scores["choice_accuracy"] in {0, 0.2, 0.4, 0.6, 0.8, 1.0}
    assert 0 < scores["latency_s"] < 5


def test_prompts_that_leave_no_room_for_an_answer_are_counted_and_said(
    model_path: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    lengths = sorted(len(prompt.prompt_ids) for prompt in read_prompts(dataset.path / "prompts.arrow"))
    small = shutil.copytree(model_path, tmp_path / "model")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": lengths[-1]}))
    notes: list[str] = []
    recipe = EvaluationRecipe(metrics=("tool_call",), generation=Generation(max_new_tokens=8))
    spec = {"recipe": recipe, "seed": 17, "model_path": small, "model_digest": "m" * 64, "dataset": dataset}
    (tmp_path / "out").mkdir()
    run(
        {**spec, "into": tmp_path / "out"},
        lambda event: notes.append(event.message) if isinstance(event, Note) else None,
    )
    (note,) = [note for note in notes if "context" in note]
    assert note.startswith(
        f"{lengths.count(lengths[-1])} of 5 prompts fill the model's context of {lengths[-1]} tokens"
    )
