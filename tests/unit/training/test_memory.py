"""The estimate of memory against what was measured on one H200 (tests/bench/results/memory_plan.jsonl)."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_core.artifacts import Architecture
from qlora_core.recipe import Lora, TrainRecipe
from qlora_core.training.memory import estimate, plan_memory
from tests.bench.memory_plan import SHAPES

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


MEASURED = [
    row
    for row in map(json.loads, (Path(__file__).parents[2] / "bench/results/memory_plan.jsonl").read_text().splitlines())
    if row["bench"] == "memory plan"
]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['shape']} {row['policy']}")
def test_a_plan_is_never_under_and_at_most_five_percent_over_what_a_gpu_took(row):
    sizes = SHAPES[row["shape"]]
    facts = architecture_of(sizes)
    planned = estimate(facts, TrainRecipe(lora=Lora(rank=16)), row["tokens"], row["policy"]).total_gib
    assert 1 <= planned / row["taken_gib"] <= 1.05


def test_the_rows_are_of_six_shapes_of_four_families_at_each_setting():
    assert {row["shape"] for row in MEASURED} == set(SHAPES)
    assert {sizes["model_type"] for sizes in SHAPES.values()} == {"llama", "mistral", "qwen2", "qwen3"}
    assert len(MEASURED) == 3 * len(SHAPES)


def architecture_of(sizes: dict[str, Any]) -> Architecture:
    """Of a shape of the bench, with its norms and biases counted."""
    heads, kv_heads, width = (sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    hidden, layers, queries, keys = sizes["hidden_size"], sizes["num_hidden_layers"], heads * width, kv_heads * width
    linears = 2 * hidden * (queries + keys) + 3 * hidden * sizes["intermediate_size"]
    small = 2 * hidden + {"qwen2": queries + 2 * keys, "qwen3": 2 * width}.get(sizes["model_type"], 0)
    embeddings = sizes["vocab_size"] * hidden * (1 if sizes["tie_word_embeddings"] else 2)
    return Architecture(
        model_type=sizes["model_type"],
        layers=layers,
        hidden=hidden,
        intermediate=sizes["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        vocab=sizes["vocab_size"],
        context_tokens=sizes["max_position_embeddings"],
        parameters=layers * (linears + small) + hidden + embeddings,
        tied_embeddings=sizes["tie_word_embeddings"],
    )
