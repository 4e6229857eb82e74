"""The estimate of memory against what was measured on one H100 (tests/bench/results/training.jsonl)."""

import pytest

from qlora_core.artifacts import Architecture
from qlora_core.recipe import TrainRecipe
from qlora_core.training.memory import estimate, plan_memory

SEVEN_B = Architecture(
    model_type="qwen2",
    layers=28,
    hidden=3584,
    intermediate=18944,
    heads=28,
    kv_heads=4,
    vocab=152_064,
    context_tokens=32_768,
    parameters=7_615_616_512,
    tied_embeddings=False,
)


def test_the_fastest_that_fits_is_planned():
    chosen = [plan_memory(SEVEN_B, TrainRecipe(), 2048, 8192, gib) for gib in (72, 20, 9, 1)]
    assert [plan.activation_memory for plan in chosen] == ["fast", "fast", "balanced", "small"]
    assert chosen[0].capacity_tokens == 8192
    assert 2048 <= chosen[1].capacity_tokens < 8192
    assert chosen[3].capacity_tokens == 2048, "a row must fit, and the device will say whether it does"
    assert all(plan.estimate.total_gib <= gib for plan, gib in zip(chosen, (72, 20, 9), strict=False))


def test_a_recipe_that_names_its_activation_memory_keeps_it():
    plan = plan_memory(SEVEN_B, TrainRecipe(activation_memory="small"), 2048, 8192, 72)
    assert plan.activation_memory == "small"


def test_a_base_in_eight_bits_takes_twice_the_weights_of_one_in_four():
    four, eight = (
        estimate(SEVEN_B, TrainRecipe(), 8192, "fast", quantization=f"gptq-int{bits}").weights_gib for bits in (4, 8)
    )
    linears_gib = (SEVEN_B.parameters - 2 * SEVEN_B.vocab * SEVEN_B.hidden) / 2**30
    assert eight - four == pytest.approx(linears_gib / 2, rel=0.01)


@pytest.mark.parametrize("less", ["balanced", "small"])
def test_keeping_less_takes_less(less):
    assert (
        estimate(SEVEN_B, TrainRecipe(), 8192, less).total_gib
        < estimate(SEVEN_B, TrainRecipe(), 8192, "fast").total_gib
    )
