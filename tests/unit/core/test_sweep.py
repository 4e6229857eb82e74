"""What a sweep tries, and which trial it takes."""

import json

import pytest

from qlora_core.errors import RecipeError
from qlora_core.recipe import Recipe
from qlora_core.sweep import PICTURE, Trial, best_of, overrides, parse_space, plot
from tasks.search import search

RECIPE = Recipe.model_validate(
    {
        "name": "small",
        "model": {"source": "local", "path": "model"},
        "data": {"rows": [{"source": "local", "path": "rows.json"}]},
        "train": {"learning_rate": 1e-4},
    }
)
KEY = "train.learning_rate"


def test_a_grid_is_every_combination_in_the_order_written():
    space = parse_space(
        [f"{KEY}=1e-4,2e-4", "train.lora.target_modules=all-linear,[q_proj, v_proj]"], [], RECIPE, False
    )
    points = search(space, None, seed=3)
    assert [overrides(point) for point in points.ask(3)][1:] == [
        (f"{KEY}=0.0001", 'train.lora.target_modules=["q_proj", "v_proj"]'),
        (f"{KEY}=0.0002", 'train.lora.target_modules="all-linear"'),
    ]
    assert (len(points.ask(3)), points.ask(3)) == (1, [])


def test_every_value_is_reached_by_the_points_that_are_checked_first():
    space = parse_space(["train.lora.rank=8,16,32"], [f"{KEY}=1e-5..1e-3"], RECIPE, True)
    corners = space.corners()
    assert len(corners) == 3
    assert {point["train.lora.rank"] for point in corners} == {"8", "16", "32"}
    assert {point[KEY] for point in corners} == {"1e-05", "0.001"}


def test_trials_stay_inside_the_space_and_are_the_same_again():
    space = parse_space(["train.lora.dropout=0,0.1"], [f"{KEY}=1e-5..1e-3", "train.epochs=1..3"], RECIPE, True)

    def tried() -> list[dict[str, str]]:
        proposals, seen = search(space, 12, seed=3), []
        while points := proposals.ask(5):
            seen += points
            proposals.tell([None, *(abs(float(point[KEY]) - 3e-4) for point in points[1:])])
        return seen

    first = tried()
    assert len(first) == 12
    assert first == tried()
    assert all(1e-5 <= float(point[KEY]) <= 1e-3 for point in first)
    assert {point["train.lora.dropout"] for point in first} == {"0", "0.1"}
    assert {json.loads(point["train.epochs"]) for point in first} <= {1, 2, 3}
    assert len({point[KEY] for point in first}) > 6


def test_a_sweep_that_names_nothing_looks_around_the_recipe():
    space = parse_space([], [], RECIPE, True)
    assert space.ranges[KEY].low < RECIPE.train.learning_rate < space.ranges[KEY].high
    assert "16" in space.grid["train.lora.rank"]


@pytest.mark.parametrize(
    ("grid", "ranges", "trials", "said"),
    [
        ([], [], False, "nothing to try"),
        ([KEY], [], False, "write a dotted key and values"),
        ([f"{KEY}=1e-4,["], [], False, "is not YAML"),
        ([f"{KEY}=1e-4", f"{KEY}=2e-4"], [], False, "is named twice"),
        ([], [f"{KEY}=1e-5..1e-3"], False, "say how many with --trials N"),
        ([], [f"{KEY}=1e-3..1e-5"], True, "write a lowest and a highest number"),
        ([], [f"{KEY}=1e-3"], True, "write a lowest and a highest number"),
        ([], [f"{KEY}=a..b"], True, "write a lowest and a highest number"),
    ],
)
def test_a_space_that_cannot_be_meant_is_refused_with_what_to_write(grid, ranges, trials, said):
    with pytest.raises(RecipeError, match=said):
        parse_space(grid, ranges, RECIPE, trials)


def test_the_best_trial_has_the_lowest_loss_and_failures_do_not_count(tmp_path):
    losses = [None, 0.5, 0.3, 0.3]
    trials = [
        Trial(number=n, values={KEY: f"{n}e-4", "train.optimizer": '"adamw"'}, loss=x) for n, x in enumerate(losses)
    ]
    assert best_of(trials).number == 2
    plot(trials, tmp_path)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RecipeError, match="no trial of 1 came to an end; the first said: out of memory"):
        best_of([Trial(number=1, values={}, loss=None, error="out of memory")])
