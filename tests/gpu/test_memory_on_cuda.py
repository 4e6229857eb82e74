"""What training is planned to take against what it takes, on CUDA."""

import pytest
import torch

from tests.bench.memory_plan import MOST_OVER, POLICIES, SHAPES, measure, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYERS = 6
"""Two more than wait on the device when the rest is in host memory."""


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_never_under_and_at_most_five_percent_over_what_is_taken(shape, tmp_path):
    base = write_model(SHAPES[shape] | {"num_hidden_layers": LAYERS}, tmp_path / shape)
    rows = [row for row in measure(base, POLICIES) if row["bench"] == "memory plan"]
    found = {row["policy"]: row["planned_over_taken"] for row in rows}
    assert list(found) == list(POLICIES)
    assert all(1 <= over <= 1 + MOST_OVER for over in found.values()), rows
