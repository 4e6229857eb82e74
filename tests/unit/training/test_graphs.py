from qlora_core.training.engine.graphs import LEAST_BYTES, Recordings

SHAPES = [(64 * at, 2, 32, 64) for at in range(1, 6)]


def test_recordings_that_were_not_used_for_longest_go_when_memory_is_taken():
    held = Recordings[str](4 * LEAST_BYTES)
    for shape in SHAPES[:3]:
        held.add(shape, str(shape), LEAST_BYTES)
    assert held.get(SHAPES[0]) == str(SHAPES[0]), "used again: now the second one is the oldest"
    held.add(SHAPES[3], "large", 2 * LEAST_BYTES)
    assert [held.get(shape) is not None for shape in SHAPES[:4]] == [True, False, True, True]


def test_the_newest_recording_stays_however_large_it_is():
    held = Recordings[str](LEAST_BYTES)
    held.add(SHAPES[0], "small", 0)
    held.add(SHAPES[1], "large", 100 * LEAST_BYTES)
    assert (len(held), held.get(SHAPES[1])) == (1, "large")


def test_hundreds_of_small_shapes_are_bounded_too():
    held = Recordings[int](10 * LEAST_BYTES)
    for number in range(500):
        held.add((number, 1, 1, 1), number, 0)
    assert len(held) == 10
