"""How much memory training on a GPU needs, from shapes alone: `qlora check` says it, the engine plans with it."""

from collections.abc import Iterator
from typing import Literal

from qlora_core.artifacts import Architecture, Record
from qlora_core.recipe import TrainRecipe

GIB = 2**30
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""4 bits, and for each 64 weights a scale of a byte whose own scales take 4 bytes for each 256 of them."""
FP32_SCALES_BYTES = 0.5 + 4 / 64
GPTQ_BYTES = {"gptq-int4": 0.5 + (2 + 1 / 2) / 128, "gptq-int8": 1 + (2 + 1) / 128}
"""4 or 8 bits, and for each 128 weights a scale in 16 bits and a zero."""
MASTER_BYTES = 4 + 4 + 2
"""An adapter parameter: fp32 value and gradient, and a 16-bit copy to compute with."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}
LOGIT_BYTES = 640 * 2**20
"""Logits that exist at a time: half as many make a 1.5B model's step 0.7 % slower, more do not make it faster."""
ON_THE_WAY = 4
"""Blocks whose kept tensors are on the device at once when the rest is in host memory."""
MICRO_BATCH_TOKENS = 16_384
"""More in one pass is no faster on any GPU of today."""

ActivationMemory = Literal["fast", "balanced", "small"]
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
) -> MemoryEstimate:
    """Peak memory of one process.

    Args:
        facts: the base model's shapes.
        recipe: rank, optimizer and quantization.
        tokens: of one forward pass.
        activation_memory: what is kept between forward and backward.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.
        quantization: of the base as stored; without one the recipe's is made while loading.
    """
    embeddings = facts.vocab * facts.hidden * (1 if facts.tied_embeddings else 2)
    linears = max(0, facts.parameters - embeddings)
    made_bytes = NF4_BYTES if recipe.quantization.double else FP32_SCALES_BYTES
    quantized_bytes = GPTQ_BYTES.get(quantization or "", made_bytes)
    per_parameter = MASTER_BYTES + OPTIMIZER_BYTES[recipe.optimizer]
    return MemoryEstimate(
        weights_gib=(linears * quantized_bytes + embeddings * bytes_per_value) / GIB,
        adapter_gib=adapter_parameters(facts, recipe.lora.rank) * per_parameter / GIB,
        activations_gib=_kept_bytes(facts, tokens, activation_memory, bytes_per_value) / GIB,
        workspace_gib=_workspace_bytes(facts, tokens, activation_memory, bytes_per_value) / GIB,
    )


def plan_memory(
    facts: Architecture,
    recipe: TrainRecipe,
    longest_row_tokens: int,
    step_tokens: int,
    available_gib: float,
    bytes_per_value: int = 2,
    quantization: str | None = None,
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
    """
    wanted = max(longest_row_tokens, min(step_tokens, MICRO_BATCH_TOKENS))
    chosen: ActivationMemory | Literal["auto"] = recipe.activation_memory
    policies = POLICIES if chosen == "auto" else (chosen,)
    enough = max(longest_row_tokens, wanted // 4)
    for policy in policies:
        for capacity in _falling(wanted, enough):
            need = estimate(facts, recipe, capacity, policy, bytes_per_value, quantization)
            if need.total_gib <= available_gib:
                return MemoryPlan(activation_memory=policy, capacity_tokens=capacity, estimate=need)
    need = estimate(facts, recipe, longest_row_tokens, policies[-1], bytes_per_value, quantization)
    return MemoryPlan(activation_memory=policies[-1], capacity_tokens=longest_row_tokens, estimate=need)


def _falling(most: int, least: int) -> Iterator[int]:
    """Numbers from the most to the least, each three quarters of the one before."""
    while most > least:
        yield most
        most = most * 3 // 4
    yield least


def adapter_parameters(facts: Architecture, rank: int) -> int:
    """Parameters of an adapter on the seven linear layers of every block."""
    key_value = facts.hidden * facts.kv_heads // facts.heads
    attention = [(facts.hidden, facts.hidden)] * 2 + [(facts.hidden, key_value)] * 2
    mlp = [(facts.hidden, facts.intermediate)] * 3
    return facts.layers * rank * sum(inputs + outputs for inputs, outputs in attention + mlp)


def _half_block_values(facts: Architecture) -> int:
    """Values a token and block without gate and up: the stream twice, queries, keys and values, attention's output."""
    return 4 * facts.hidden + 2 * facts.hidden * facts.kv_heads // facts.heads


def _kept_bytes(facts: Architecture, tokens: int, policy: ActivationMemory, bytes_per_value: int) -> int:
    """What is kept between forward and backward."""
    log_sums = 4 * facts.heads
    half = tokens * (_half_block_values(facts) * bytes_per_value + log_sums)
    if policy == "small":
        return min(ON_THE_WAY, facts.layers) * half
    gate_up = tokens * 2 * facts.intermediate * bytes_per_value if policy == "fast" else 0
    return facts.layers * (half + gate_up)


def _workspace_bytes(facts: Architecture, tokens: int, policy: ActivationMemory, bytes_per_value: int) -> int:
    """The most that exists beside what is kept: at the head, or in the backward of an MLP."""
    stream = tokens * facts.hidden * bytes_per_value
    logits = min(LOGIT_BYTES, tokens * facts.vocab * bytes_per_value)
    recomputed = 0 if policy == "fast" else 2 * facts.intermediate * tokens * bytes_per_value
    inner = tokens * facts.intermediate * bytes_per_value
    weight = 2 * facts.intermediate * facts.hidden * bytes_per_value
    return max(4 * stream + logits, recomputed + inner + 2 * stream + weight)
