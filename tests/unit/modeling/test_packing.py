import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_core.modeling.packing import efficiency


def test_efficiency_is_tokens_over_slots():
    assert efficiency([5, 5, 5], 10) == 0.75
    assert efficiency([], 10) == 0


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_efficiency_counts_the_bins_of_a_search_through_all_bins(lengths: list[int]):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda at: rooms[at])] -= length
        else:
            rooms.append(64 - length)
    assert efficiency(lengths, 64) == sum(lengths) / (len(rooms) * 64)


def test_long_texts_pack_to_more_than_98_percent():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 5000).clip(8, 2048).astype(int)
    assert efficiency(lengths.tolist(), 2048) > 0.98
