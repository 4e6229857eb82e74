"""What rounding costs, in words."""

import pytest

from qlora_core.artifacts import RoundingCost


@pytest.mark.parametrize(
    ("cost", "standard_error", "gain", "said"),
    [
        (0.0130, 0.0010, 1.3, "rounding to bfloat16 costs 0.0130 nats (1.0% of what training gained)"),
        (0.0130, 0.0010, -0.1, "rounding to bfloat16 costs 0.0130 nats"),
        (0.0019, 0.0010, 1.3, "rounding to bfloat16 costs nothing measurable"),
        (-0.0005, 0.0001, 1.3, "rounding to bfloat16 costs nothing measurable"),
        (0.0, 0.0, 1.3, "rounding to bfloat16 costs nothing measurable"),
    ],
    ids=["measured", "nothing gained", "within its spread", "less than nothing", "exactly nothing"],
)
def test_a_cost_is_told_where_it_is_measured(cost: float, standard_error: float, gain: float, said: str):
    found = RoundingCost(dtype="bfloat16", loss=0.5, cost=cost, standard_error=standard_error, gain=gain, notable=False)
    assert found.in_words() == said
