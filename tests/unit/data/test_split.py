from qlora_core.data.split import in_evaluation


def test_the_share_is_near_the_fraction():
    kept = sum(in_evaluation(f"row {at}", 17, 0.1) for at in range(20_000))
    assert abs(kept / 20_000 - 0.1) < 0.01


def test_a_larger_fraction_only_adds_rows():
    keys = [f"row {at}" for at in range(2000)]
    small, large = ({key for key in keys if in_evaluation(key, 3, share)} for share in (0.1, 0.2))
    assert small < large


def test_another_seed_chooses_other_rows():
    keys = [f"row {at}" for at in range(2000)]
    first, second = ({key for key in keys if in_evaluation(key, seed, 0.1)} for seed in (1, 2))
    assert first != second
