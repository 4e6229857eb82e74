import math

import numpy as np
import pytest

from qlora_core.evaluation.bootstrap import RowSums, exp_ratio, interval_of_difference, mean_of, ratio


def perplexity_of(nats: np.ndarray, tokens: np.ndarray) -> RowSums:
    return RowSums(np.column_stack([nats, tokens]), exp_ratio)


def test_an_interval_of_paired_shares_holds_the_truth_about_as_often_as_it_says() -> None:
    random, rows, trials, truth = np.random.default_rng(1), 80, 300, 0.75 - 0.6
    held = 0
    for _ in range(trials):
        difficulty = random.uniform(size=rows)  # the same for both models: that is what pairing is for
        candidate, other = (difficulty < 0.75).astype(float), (difficulty < 0.6).astype(float)
        interval = interval_of_difference(mean_of(candidate.tolist()), mean_of(other.tolist()))
        held += interval.low <= truth <= interval.high
    assert 0.90 <= held / trials <= 0.98


def test_an_interval_of_perplexities_holds_the_truth_about_as_often_as_it_says() -> None:
    random, rows, trials = np.random.default_rng(2), 60, 300
    truth, held = math.exp(1.0) - math.exp(1.2), 0
    for _ in range(trials):
        tokens = random.integers(20, 200, rows).astype(float)
        shared = random.normal(0, 0.3, rows)
        ours = tokens * (1.0 + shared + random.normal(0, 0.05, rows))
        theirs = tokens * (1.2 + shared + random.normal(0, 0.05, rows))
        interval = interval_of_difference(perplexity_of(ours, tokens), perplexity_of(theirs, tokens))
        held += interval.low <= truth <= interval.high
    assert 0.90 <= held / trials <= 0.98


def test_pairing_makes_the_interval_narrow_where_rows_differ_more_than_models() -> None:
    random = np.random.default_rng(3)
    hard = random.normal(10, 5, 100)
    ours, theirs = hard - 0.1, hard
    paired = interval_of_difference(mean_of(ours.tolist()), mean_of(theirs.tolist()))
    shuffled = interval_of_difference(mean_of(ours.tolist()), mean_of(random.permutation(theirs).tolist()))
    assert paired.high - paired.low < 1e-9
    assert shuffled.high - shuffled.low > 1


def test_equal_models_differ_by_nothing() -> None:
    values = mean_of([0.0, 1.0, 1.0])
    interval = interval_of_difference(values, values)
    assert (interval.low, interval.high) == (0, 0)


def test_the_same_rows_give_the_same_interval() -> None:
    ours, theirs = mean_of([0.1, 0.9, 0.4, 0.7]), mean_of([0.2, 0.3, 0.5, 0.1])
    assert interval_of_difference(ours, theirs) == interval_of_difference(ours, theirs)


def test_drawing_in_several_blocks_gives_the_quantiles_of_a_plain_bootstrap() -> None:
    random = np.random.default_rng(4)
    values = random.normal(0, 1, 5000)  # so many rows that the draws do not fit in one block
    interval = interval_of_difference(mean_of(values.tolist()), mean_of(np.zeros(5000).tolist()))
    means = [random.choice(values, 5000).mean() for _ in range(2000)]
    assert [interval.low, interval.high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.005)


def test_a_ratio_over_nothing_is_not_a_number() -> None:
    assert math.isnan(RowSums(np.array([[1.0, 0.0]]), ratio).score)
