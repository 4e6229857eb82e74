"""How much memory training needs, estimated from shapes before anything is loaded."""

from qlora_core.artifacts import Architecture, Record
from qlora_core.recipe import TrainRecipe

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64  # 4 bits and, per 64 weights, one scale (about a byte once doubly quantized)
ADAM_BYTES = 16  # fp32 weight, gradient and two moments
ACTIVATION_COPIES = 34
"""Saved values per token and layer in units of the hidden size, without recomputation (arXiv:2205.05198, table 2)."""


class MemoryEstimate(Record):
    """GiB by what takes it."""

    weights_gib: float
    adapter_gib: float
    activations_gib: float

    @property
    def total_gib(self) -> float:
        """All of it."""
        return self.weights_gib + self.adapter_gib + self.activations_gib


def estimate(facts: Architecture, recipe: TrainRecipe, micro_batch_tokens: int, bytes_per_value: int) -> MemoryEstimate:
    """Peak memory of one process.

    Args:
        facts: the base model's shapes.
        recipe: rank and activation memory decide the rest.
        micro_batch_tokens: tokens of one forward pass, padding included.
        bytes_per_value: 2 for bf16 and fp16, 4 for fp32.
    """
    embeddings = facts.vocab * facts.hidden * (1 if facts.tied_embeddings else 2)
    linears = max(0, facts.parameters - embeddings)
    per_layer = 1 if recipe.activation_memory == "small" else ACTIVATION_COPIES
    activations = micro_batch_tokens * facts.hidden * facts.layers * per_layer * bytes_per_value / 2
    return MemoryEstimate(
        weights_gib=(linears * NF4_BYTES + embeddings * bytes_per_value) / GIB,
        adapter_gib=adapter_parameters(facts, recipe.lora.rank) * ADAM_BYTES / GIB,
        activations_gib=activations / GIB,
    )


def adapter_parameters(facts: Architecture, rank: int) -> int:
    """Parameters of an adapter on the seven linear layers of every block."""
    key_value = facts.hidden * facts.kv_heads // facts.heads
    attention = [(facts.hidden, facts.hidden)] * 2 + [(facts.hidden, key_value)] * 2
    mlp = [(facts.hidden, facts.intermediate)] * 3
    return facts.layers * rank * sum(inputs + outputs for inputs, outputs in attention + mlp)
