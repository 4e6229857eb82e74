"""The lm-evaluation-harness itself, on rows of this machine, against plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.artifacts import PreparedDataset
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.evaluate import differences, evaluate
from qlora_core.events import ignore
from qlora_core.recipe import EvaluationRecipe, Harness

pytestmark = pytest.mark.extras

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The colour of {{thing}} is"
doc_to_choice: [red, green, blue]
doc_to_target: "{{colour}}"
metric_list: [{metric: acc}]
"""
COLOURS = ["red", "green", "blue"]
QUESTIONS = [
    {"thing": thing, "colour": number % 3}
    for number, thing in enumerate(["grass", "sky", "blood", "sea", "rose", "leaf"])
]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "colours.yaml").write_text(TASK)
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return Harness(folder=folder, tasks=("colours",), chat=False)


def test_a_task_of_local_rows_scores_like_plain_transformers_and_has_an_interval(
    harness: Harness, model_path: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    recipe = EvaluationRecipe(metrics=("loss", "harness"), harness=harness)
    scores = evaluate(recipe, 17, model_path, "m" * 64, dataset, tmp_path, ignore)
    right = [most_likely(model_path, question["thing"]) == question["colour"] for question in QUESTIONS]
    rows = [json.loads(line) for line in (tmp_path / "harness.jsonl").read_text().splitlines()]
    assert [row["metrics"]["colours_acc"] for row in rows] == list(map(float, right))
    assert scores.scores["colours_acc"] == pytest.approx(sum(right) / len(right))
    interval = differences(scores, scores, None)["base"]["colours_acc"]
    assert (interval.low, interval.high) == (0, 0)


def test_a_task_that_no_file_defines_is_refused_with_those_that_are(
    harness: Harness, model_path: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    recipe = EvaluationRecipe(metrics=("harness",), harness=harness.model_copy(update={"tasks": ("shapes",)}))
    with pytest.raises(EvaluationError, match=r"names shapes, which no YAML file of .* defines; it defines colours"):
        evaluate(recipe, 17, model_path, "m" * 64, dataset, tmp_path, ignore)


@torch.no_grad()
def most_likely(model_path: Path, thing: str) -> int:
    """Which colour has the highest likelihood after the question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    question = f"The colour of {thing} is"
    sums = []
    for colour in COLOURS:
        ids = tokenizer(f"{question} {colour}", return_tensors="pt")["input_ids"]
        asked = len(tokenizer(question)["input_ids"])
        log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probabilities.gather(-1, ids[0, 1:, None])[:, 0]
        sums.append(float(picked[asked - 1 :].sum()))
    return sums.index(max(sums))
