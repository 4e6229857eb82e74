import random

import numpy as np
import pytest

from qlora_core.data.candidates import Candidate
from qlora_core.data.conversation import Conversation, Message
from qlora_core.data.near import band_keys, sift
from qlora_core.data.summary import Tally
from qlora_core.data.template import Rendered

WORDS = [f"word{at}" for at in range(2000)]


def candidate(row: int, text: str, evaluation: bool = False) -> Candidate:
    said = Conversation((Message("user", text), Message("assistant", "yes")))
    return Candidate("rows", row, row.to_bytes(16, "big"), evaluation, Rendered("", ()), None, None, said)


def text(seed: int) -> list[str]:
    return random.Random(seed).sample(WORDS, 100)


def changed(words: list[str], share: float) -> str:
    count = round(len(words) * share)
    return " ".join(["other" + str(at) for at in range(count)] + words[count:])


def kept(rows: list[Candidate], policy: str) -> tuple[list[int], Tally]:
    tally = Tally()
    return [row.row for row in sift(rows, policy, tally)], tally


def test_near_copies_are_found_across_chunks_and_different_rows_are_not():
    rows = [candidate(at, " ".join(text(at))) for at in range(3000)]
    rows += [candidate(3000 + at, changed(text(at), 0.01)) for at in range(200)]
    left, tally = kept(rows, "report")
    assert left == list(range(3200))
    assert list(tally.noticed) == ["near_duplicate"]
    assert 190 <= tally.noticed["near_duplicate"] <= 200


def test_a_near_copy_on_the_other_side_is_a_leak_whichever_comes_first():
    rows = [candidate(0, " ".join(text(0))), candidate(1, " ".join(text(0)), True)]
    rows += [candidate(2, " ".join(text(1)), True), candidate(3, " ".join(text(1)))]
    left, tally = kept(rows, "drop")
    assert left == [0, 2]
    assert tally.dropped == {"near_leak": 2}
    assert (tally.drops["near_leak"].example.row, tally.bad) == (1, 0)


def test_nothing_is_looked_for_where_the_recipe_says_so():
    rows = [candidate(at, "the same words") for at in range(3)]
    assert kept(rows, "ignore")[0] == [0, 1, 2]
    assert kept(rows, "drop")[0] == [0]


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 1.0, 1.0), (0.02, 0.8, 1.0), (0.35, 0.0, 0.02)])
def test_the_share_of_pairs_that_are_found_is_as_documented(share: float, least: float, most: float):
    pairs = range(300)
    one = band_keys([" ".join(text(at)) for at in pairs])
    two = band_keys([changed(text(at), share) for at in pairs])
    assert least <= np.mean((one == two).any(1)) <= most


def test_chinese_is_compared_by_characters():
    words = "今天天气很好我们一起去公园散步吧然后在湖边喝一杯热茶看看来来往往的船和对岸的灯火直到天黑"
    rows = [candidate(0, words), candidate(1, words[::-1]), candidate(2, words)]
    assert kept(rows, "drop")[0] == [0, 1]


def test_a_stray_accent_does_not_hide_a_near_copy():
    rows = [candidate(at, " ".join(text(at))) for at in range(50)]
    rows += [candidate(50 + at, " ".join([*text(at), "naïve"])) for at in range(50)]
    assert len(kept(rows, "drop")[0]) <= 60
