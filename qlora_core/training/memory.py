"""How much memory training on a GPU needs, from shapes alone: `qlora check` says it, the engine plans with it."""

from collections.abc import Iterator
from typing import Literal

from qlora_core.artifacts import Architecture, Record
from qlora_core.recipe import TrainRecipe
from qlora_core.training.pass_memory import (
    PRODUCT_WORKSPACES,
    WORKSPACE_BYTES,
    ActivationMemory,
    PassShape,
    pass_memory,
    resident_bytes,
    rest_behind,
)

GIB = 2**30
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""4 bits, and for each 64 weights a scale of a byte whose own scales take 4 bytes for each 256 of them."""
FP32_SCALES_BYTES = 0.5 + 4 / 64
GPTQ_BYTES = {"gptq-int4": 0.5 + (2 + 1 / 2) / 128, "gptq-int8": 1 + (2 + 1) / 128}
"""4 or 8 bits, and for each 128 weights a scale in 16 bits and a zero."""
MASTER_BYTES = 4 + 4
"""An adapter parameter: value and gradient in fp32; a copy to compute with comes on top."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}
MICRO_BATCH_TOKENS = 16_384
"""More in one pass is no faster on any GPU of today."""

POLICIES: tuple[ActivationMemory, ...] = ("fast", "balanced", "small")


class MemoryEstimate(Record):
    """GiB by what takes it."""

    weights_gib: float
    adapter_gib: float
    activations_gib: float
    workspace_gib: float

    @property
    def total_gib(self) -> float:
        """All of it."""
        return self.weights_gib + self.adapter_gib + self.activations_gib + self.workspace_gib


class MemoryPlan(Record):
    """What one forward and backward pass may hold, and what it keeps."""

    activation_memory: ActivationMemory
    capacity_tokens: int
    estimate: MemoryEstimate


def estimate(
    facts: Architecture,
    recipe: TrainRecipe,
    tokens: int,
    activation_memory: ActivationMemory,
    bytes_per_value: int = 2,
    quantization: str | None = None,
    on_gpu: bool = True,
) -> MemoryEstimate:
    """Peak memory of one process: a pass that follows an optimizer step, when the optimizer has its state.

    Args:
        facts: the base model's shapes.
        recipe: rank, optimizer and quantization.
        tokens: of one forward pass.
        activation_memory: what is kept between forward and backward.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.
        quantization: of the base as stored; without one the recipe's is made while loading.
        on_gpu: `small` then keeps in host memory what it computes again on a CPU, and cuBLAS has its workspaces.
    """
    embeddings = facts.vocab * facts.hidden * (1 if facts.tied_embeddings else 2)
    linears = max(0, facts.parameters - embeddings)
    made_bytes = NF4_BYTES if recipe.quantization.double else FP32_SCALES_BYTES
    quantized_bytes = GPTQ_BYTES.get(quantization or "", made_bytes)
    per_parameter = MASTER_BYTES + bytes_per_value + OPTIMIZER_BYTES[recipe.optimizer]
    dropout = recipe.lora.dropout > 0
    memory = pass_memory(
        PassShape(facts, tokens, recipe.lora.rank, bytes_per_value, dropout, on_gpu), activation_memory
    )
    noise = 2 * tokens * facts.hidden * bytes_per_value if recipe.neftune_alpha else 0  # also what is recorded reads it
    workspaces = PRODUCT_WORKSPACES * WORKSPACE_BYTES if on_gpu else 0
    return MemoryEstimate(
        weights_gib=(
            linears * quantized_bytes
            + embeddings * bytes_per_value
            + _allocator_rests(facts, quantized_bytes, bytes_per_value)
        )
        / GIB,
        adapter_gib=adapter_parameters(facts, recipe.lora.rank) * per_parameter / GIB,
        activations_gib=memory.kept / GIB,
        workspace_gib=(memory.passing + noise + workspaces) / GIB,
    )


def plan_memory(
    facts: Architecture,
    recipe: TrainRecipe,
    longest_row_tokens: int,
    step_tokens: int,
    available_gib: float,
    bytes_per_value: int = 2,
    quantization: str | None = None,
    on_gpu: bool = True,
) -> MemoryPlan:
    """The fastest way of keeping activations, and the largest pass, that fit.

    Args:
        facts: the base model's shapes.
        recipe: `activation_memory: auto` leaves the choice.
        longest_row_tokens: no pass can hold less.
        step_tokens: of one process in an optimizer step; no pass needs to hold more.
        available_gib: for everything.
        bytes_per_value: 2 for bf16, 4 for fp32.
        quantization: of the base as stored.
        on_gpu: see `estimate`.
    """
    wanted = max(longest_row_tokens, min(step_tokens, MICRO_BATCH_TOKENS))
    chosen: ActivationMemory | Literal["auto"] = recipe.activation_memory
    policies = POLICIES if chosen == "auto" else (chosen,)
    enough = max(longest_row_tokens, wanted // 4)
    for policy in policies:
        for capacity in _falling(wanted, enough):
            need = estimate(facts, recipe, capacity, policy, bytes_per_value, quantization, on_gpu)
            if need.total_gib <= available_gib:
                return MemoryPlan(activation_memory=policy, capacity_tokens=capacity, estimate=need)
    need = estimate(facts, recipe, longest_row_tokens, policies[-1], bytes_per_value, quantization, on_gpu)
    return MemoryPlan(activation_memory=policies[-1], capacity_tokens=longest_row_tokens, estimate=need)


def _falling(most: int, least: int) -> Iterator[int]:
    """Numbers from the most to the least, each three quarters of the one before."""
    while most > least:
        yield most
        most = most * 3 // 4
    yield least


def _allocator_rests(facts: Architecture, quantized_bytes: float, bytes_per_value: int) -> int:
    """What the allocator gives to weights beyond their size: packed values and scales are tensors of their own."""
    whole_bytes = int(quantized_bytes) or 0.5  # of a packed value, without its scale
    embedding = facts.vocab * facts.hidden * bytes_per_value
    rests = (resident_bytes(embedding) - embedding) * (1 if facts.tied_embeddings else 2)
    for inputs, outputs in _linears(facts):
        packed, scales = (round(inputs * outputs * each) for each in (whole_bytes, quantized_bytes - whole_bytes))
        apart = sum(resident_bytes(size) - size for size in (packed, scales))
        rests += facts.layers * max(apart, rest_behind(packed, scales))
    return rests


def _linears(facts: Architecture) -> list[tuple[int, int]]:
    """Inputs and outputs of the seven linear layers of a block."""
    queries, keys = facts.heads * facts.head_width, facts.kv_heads * facts.head_width
    attention = [(facts.hidden, queries), (queries, facts.hidden), (facts.hidden, keys), (facts.hidden, keys)]
    return [*attention, *[(facts.hidden, facts.intermediate)] * 3]


def adapter_parameters(facts: Architecture, rank: int) -> int:
    """Parameters of an adapter on the seven linear layers of every block."""
    return facts.layers * rank * sum(inputs + outputs for inputs, outputs in _linears(facts))
