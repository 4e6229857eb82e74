import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_core.data.packing import best_fit_decreasing, efficiency


def test_the_longest_row_goes_first_and_each_into_the_fullest_bin_with_room():
    assert best_fit_decreasing([3, 6, 4, 7, 5], 10) == [[3, 0], [1, 2], [4]]


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_row_is_packed_once_and_no_bin_overflows(lengths: list[int]):
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 64 for rows in bins)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_it_equals_the_search_through_all_bins(lengths: list[int]):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda at: rooms[at])] -= length
        else:
            rooms.append(64 - length)
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(64 - sum(lengths[row] for row in rows) for rows in bins) == sorted(rooms)


def test_a_row_longer_than_a_bin_is_refused():
    with pytest.raises(ValueError, match="a row has 11 tokens; a bin holds 10"):
        best_fit_decreasing([11], 10)


def test_efficiency_is_tokens_over_slots():
    assert efficiency([5, 5, 5], 10) == 0.75
    assert efficiency([], 10) == 0


def test_long_texts_pack_to_more_than_98_percent():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 5000).clip(8, 2048).astype(int)
    assert efficiency(lengths.tolist(), 2048) > 0.98
