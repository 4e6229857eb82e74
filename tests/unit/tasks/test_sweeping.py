"""What a sweep may vary: only what leaves trials comparable."""

import json

import pytest

from qlora_core.errors import RecipeError
from qlora_core.recipe import load_recipe
from qlora_core.sweep import parse_space
from tasks.sweeping import refuse_incomparable

RECIPE = {
    "name": "small",
    "model": {"source": "local", "path": "model"},
    "data": {"rows": [{"source": "local", "path": "rows.json"}, {"source": "local", "path": "more.json"}]},
    "train": {"evaluate_every_steps": 5},
}
OWN_ROWS = {"evaluation_rows": [{"source": "local", "path": "judge.json"}]}


def vary(folder, *grid, ranges=(), **data):
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**RECIPE, "data": {**RECIPE["data"], **data}}))
    space = parse_space(grid, ranges, load_recipe(path), bool(ranges))
    refuse_incomparable(space, lambda varied: load_recipe(path, varied))


@pytest.mark.parametrize(
    "varied",
    [
        "data.split.evaluation_fraction=0.1,0.2",
        "data.seq_len_tokens=128,256",
        "data.loss=everything,last_turn",
        "data.too_long=drop,truncate",
        "data.near_duplicates=report,drop",
        "data.rows.0.weight=0.5,1",
        "data.rows.0.path=rows.json,other.json",
        "data.forgetting_tokens=128,256",
        "model.path=model,larger",
        "seed=1,2",
        "evaluation.metrics=[loss],[loss, exact_match]",
        "evaluation.max_rows=10,20",
    ],
)
def test_what_changes_how_a_trial_is_measured_is_refused_by_name(tmp_path, varied):
    with pytest.raises(RecipeError, match="the lowest loss would say nothing") as caught:
        vary(tmp_path, "train.learning_rate=1e-4,2e-4", varied)
    key = varied.partition("=")[0]
    assert f"cannot vary {key}: " in str(caught.value)
    assert "--set" in str(caught.value)


@pytest.mark.parametrize(
    "varied",
    [
        "train.lora.rank=8,16",
        "train.quantization.kind=nf4,fp4",
        "train.neftune_alpha=0,5",
        "train.early_stopping=null,{patience: 2}",
        "merge.max_shard_mb=100,200",
        "data.seq_len_tokens=128",
    ],
)
def test_what_leaves_trials_comparable_may_vary(tmp_path, varied):
    vary(tmp_path, varied, "train.learning_rate=1e-4,2e-4")


def test_a_range_of_what_changes_the_measure_is_refused_too(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot vary data\.split\.evaluation_fraction: "):
        vary(tmp_path, ranges=("data.split.evaluation_fraction=0.1..0.3",))


def test_rows_of_training_may_vary_where_evaluation_has_its_own(tmp_path):
    vary(tmp_path, "data.rows.0.weight=0.25,1", "data.rows.1.max_rows=10,20", **OWN_ROWS)
    with pytest.raises(RecipeError, match=r"cannot vary data\.evaluation_rows\.0\.path: "):
        vary(tmp_path, "data.evaluation_rows.0.path=judge.json,other.json", **OWN_ROWS)


def test_a_value_that_is_no_recipe_is_refused_as_such(tmp_path):
    with pytest.raises(RecipeError, match=r"train\.lora\.rank"):
        vary(tmp_path, "train.lora.rank=8,0")
