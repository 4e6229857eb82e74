from itertools import pairwise

import numpy as np
import pytest

from qlora_core.recipe import TrainRecipe
from qlora_core.training.plan import micro_batches, packed_micro_batches, plan_steps, share_of
from qlora_core.training.schedule import learning_rate

LENGTHS = np.array([10, 200, 30, 4000, 50, 60, 70, 80])


def test_every_epoch_sees_every_row_once_in_another_order():
    steps = plan_steps(rows=10, effective_batch_rows=5, epochs=2, max_steps=None, seed=3)
    first, second = np.concatenate(steps[:2]), np.concatenate(steps[2:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_only_the_last_step_is_smaller():
    steps = plan_steps(rows=7, effective_batch_rows=4, epochs=2, max_steps=None, seed=0)
    assert [len(step) for step in steps] == [4, 4, 4, 2]


def test_the_plan_depends_on_the_seed_alone():
    one, again, other = (plan_steps(20, 4, 1, None, seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_max_steps_ends_training_early():
    assert len(plan_steps(100, 10, 5, max_steps=3, seed=0)) == 3


def test_part_of_an_epoch_takes_part_of_the_rows():
    assert sum(len(step) for step in plan_steps(100, 10, 0.25, None, 0)) == 25


def test_micro_batches_hold_every_row_once_longest_first():
    parts = micro_batches(np.arange(8), LENGTHS, 3)
    assert sorted(np.concatenate(parts)) == list(range(8))
    assert LENGTHS[parts[0][0]] == 4000
    assert [len(part) for part in parts] == [3, 3, 2]


def test_auto_takes_what_fits_with_padding():
    assert [len(part) for part in micro_batches(np.array([0, 2, 4]), LENGTHS, "auto")] == [3]
    assert [len(part) for part in micro_batches(np.array([0, 3]), LENGTHS, "auto")] == [1, 1]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_all_micro_batches_in_equally_many_rounds(processes):
    parts = micro_batches(np.arange(8), LENGTHS, 2)
    shares = [share_of(parts, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(int(row) for share in shares for part in share for row in part) == list(range(8))


def test_the_rate_rises_to_its_peak_and_falls_without_reaching_zero():
    rates = [learning_rate(step, 20, TrainRecipe(learning_rate=1e-3, warmup_ratio=0.1)) for step in range(1, 21)]
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert 0 < rates[-1] < 2e-5


def test_linear_and_constant_schedules():
    linear, constant = (
        TrainRecipe(learning_rate=1.0, schedule=kind, warmup_ratio=0) for kind in ("linear", "constant")
    )
    assert learning_rate(11, 20, linear) == pytest.approx(0.5)
    assert learning_rate(20, 20, constant) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_ends_at_its_least_rate(schedule):
    recipe = TrainRecipe(learning_rate=1e-3, schedule=schedule, warmup_ratio=0, min_learning_rate_ratio=0.1)
    assert learning_rate(1, 20, recipe) == pytest.approx(1e-3)
    assert learning_rate(21, 20, recipe) == pytest.approx(1e-4)


def test_steps_of_similar_length_hold_every_row_once_and_follow_no_trend():
    lengths = np.random.default_rng(0).integers(10, 1000, 403)
    steps = plan_steps(403, 8, 1, None, seed=5, group_by=lengths)
    assert sorted(np.concatenate(steps)) == list(range(403))
    assert np.mean([np.ptp(lengths[step]) for step in steps]) < 100
    longest = [int(lengths[step].max()) for step in steps[:-1]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_packed_passes_hold_every_row_once_and_no_more_tokens_than_fit(processes):
    lengths = np.random.default_rng(0).integers(1, 500, 200)
    parts = packed_micro_batches(np.arange(200), lengths, "auto", 2048, processes)
    assert sorted(np.concatenate(parts)) == list(range(200))
    assert max(lengths[part].sum() for part in parts) <= 2048
    assert len(parts) % processes == 0


def test_packed_passes_share_a_small_step_among_processes():
    parts = packed_micro_batches(np.array([0, 2, 4, 5]), LENGTHS, "auto", 10_000, 2)
    assert [sorted(part) for part in parts] == [[0, 5], [2, 4]]


def test_a_row_longer_than_a_pass_has_one_of_its_own():
    parts = packed_micro_batches(np.array([0, 3, 4]), LENGTHS, "auto", 2048, 1)
    assert [list(part) for part in parts if 3 in part] == [[3]]
