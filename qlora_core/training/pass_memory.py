"""What one forward and backward pass of the engine holds, moment by moment, from shapes alone.

`engine.py` is written out, so what lives at each moment can be read in it. Every tensor is one line here, at the size
that PyTorch's allocator gives it. The peak is the moment that holds most; which one that is depends on the shape: the
head where the vocabulary is large, the MLP's backward where it is wide, attention's backward where heads are wide.
"""

from math import ceil
from typing import Literal, NamedTuple

from qlora_core.artifacts import Architecture

ActivationMemory = Literal["fast", "balanced", "small"]
MIB = 2**20
FP32 = 4
LOGIT_BYTES = 640 * MIB
"""Logits that exist at a time: half as many make a 1.5B model's step 0.7 % slower, more do not make it faster."""
LEAST_LOGIT_ROWS, TILE_ROWS = 64, 256
"""The second: rows of the largest tiles of matrix products."""
ON_THE_WAY = 4
"""Blocks whose kept tensors are on the device at once when the rest is in host memory: two at the end of the forward
stay, and two may still be on their way out."""
SUMS_COLUMNS = 512
"""Columns of a wide gradient whose partial products one program adds up: each leaves `[tokens, rank]` sums in fp32."""
LARGEST_FUSED_RANK = 32
"""Above it, sums of partial products would cost as much memory traffic as reading the wide matrices again."""
PRODUCT_WORKSPACES, WORKSPACE_BYTES = 4, 33 * MIB
"""cuBLAS holds one for each stream (the main one, the one beside it, the one that records), and cuBLASLt one; of 32 MiB
on Hopper, smaller before, with up to a MiB that the allocator does not cut off."""
LARGE_BYTES, SEGMENT_BYTES, SPLIT_BYTES, ROUND_BYTES = 10 * MIB, 2 * MIB, MIB, 512
"""PyTorch's CUDA allocator: larger blocks are whole segments, of which no rest below a MiB is cut off."""


class PassShape(NamedTuple):
    """What decides the sizes of a pass."""

    facts: Architecture
    tokens: int
    rank: int
    bytes_per_value: int = 2
    has_dropout: bool = False
    """Adapters then stand apart from the weights, and keep what their first matrices made."""
    host_memory: bool = True
    """Whether `small` keeps tensors in host memory, as on CUDA, or computes them again, as on a CPU."""


class PassMemory(NamedTuple):
    """Bytes."""

    kept: int
    """By blocks, between forward and backward, at the moment when most is."""
    passing: int
    """The most that exists beside it."""


def pass_memory(shape: PassShape, policy: ActivationMemory) -> PassMemory:
    """The peak of a pass, without what lives before and after it."""
    block = _Block(shape)
    first_part = block.entry if policy == "small" and not shape.host_memory else block.half
    each = first_part + block.low + (block.gate_up + block.gate_up_low if policy == "fast" else 0)
    layers = shape.facts.layers
    kept = each * (min(ON_THE_WAY, layers) if policy == "small" and shape.host_memory else layers)
    # what the running block holds and does not keep
    again = block.half - first_part + (0 if policy == "fast" else block.gate_up + block.gate_up_low)
    return PassMemory(kept, max(again + _backward(block), _head(block)) + _whole_pass(block))


class _Block:
    """Bytes of the tensors of one decoder block."""

    def __init__(self, shape: PassShape) -> None:
        facts, self.shape = shape.facts, shape
        queries, keys = facts.heads * facts.head_width, facts.kv_heads * facts.head_width
        self.hidden = self.tensor(facts.hidden)
        self.inner = self.tensor(facts.intermediate)
        self.gate_up = self.tensor(2 * facts.intermediate)
        self.qkv = self.tensor(queries + 2 * keys)
        self.rotated = self.tensor(queries + keys)
        self.queries, self.keys = self.tensor(queries), self.tensor(keys)
        self.log_sum = self.tensor(facts.heads, FP32)
        self.entry = self.hidden
        self.half = 2 * self.hidden + self.qkv + self.queries + self.log_sum
        """What is kept of a block without gate and up: the stream twice, queries, keys and values, attention's output
        and its log-sums."""
        self.low = self.tensor(shape.rank)
        self.gate_up_low = self.tensor(2 * shape.rank) if shape.has_dropout else 0
        weights = (facts.hidden * (queries + 2 * keys), facts.hidden * queries)
        self.qkv_weight, self.o_weight = (block_bytes(size * shape.bytes_per_value) for size in weights)
        self.down_weight = block_bytes(facts.hidden * facts.intermediate * shape.bytes_per_value)
        self.gate_up_weight = block_bytes(2 * facts.hidden * facts.intermediate * shape.bytes_per_value)

    def tensor(self, width: int, bytes_per_value: int | None = None) -> int:
        """`[tokens, width]`"""
        return block_bytes(self.shape.tokens * width * (bytes_per_value or self.shape.bytes_per_value))

    @property
    def sums(self) -> int:
        """Partial sums of the backward of gate's and up's adapters."""
        if self.shape.rank > LARGEST_FUSED_RANK:
            return 0
        tiles = ceil(2 * self.shape.facts.intermediate / SUMS_COLUMNS)
        return self.tensor(tiles * self.shape.rank, FP32)


def _backward(block: _Block) -> int:
    """Beside what the running block keeps, gate and up included; its forward holds less than that at every moment.

    The gradient of the residual stream is always there.
    """
    apart = block.hidden if block.shape.has_dropout else 0
    moments = (
        block.inner + block.down_weight,  # the activation's gradient
        block.inner + block.gate_up_weight + block.hidden,  # the activation waits for its adapter's gradients
        block.hidden + block.sums + apart,  # gradients of gate's and up's adapters, which go on in the next two
        _attention_backward(block),
        block.qkv + block.qkv_weight + block.hidden,
    )
    return block.hidden + max(moments)


def _attention_backward(block: _Block) -> int:
    """FlashAttention 2 adds up the queries' gradient in fp32, and makes one of keys and values for every query head."""
    facts = block.shape.facts
    fp32_gradient = block.tensor(facts.heads * facts.head_width, FP32) + block.log_sum
    for_each_head = 2 * block.queries if facts.kv_heads < facts.heads else 0
    gradients = block.queries + 2 * block.keys
    return block.queries + block.rotated + gradients + fp32_gradient + for_each_head


def _head(block: _Block) -> int:
    """Beside what all blocks keep: the stream, its norm and the rows that predict, with logits, or their gradients."""
    facts, shape = block.shape.facts, block.shape
    row_bytes = facts.vocab * shape.bytes_per_value
    logits = block_bytes(min(shape.tokens, logit_rows(facts.vocab, shape.bytes_per_value)) * row_bytes)
    return 3 * block.hidden + max(logits, block.hidden)


def logit_rows(vocabulary: int, bytes_per_value: int) -> int:
    """Rows of logits that exist at a time."""
    rows = LOGIT_BYTES // (vocabulary * bytes_per_value)
    return max(LEAST_LOGIT_ROWS, rows // TILE_ROWS * TILE_ROWS)


def _whole_pass(block: _Block) -> int:
    """What all blocks read: angles; and token ids, positions and targets in 8 bytes each, once more when recorded."""
    return 2 * block.tensor(block.shape.facts.head_width) + 2 * 4 * block.tensor(1, 8)


def block_bytes(size: int) -> int:
    """What the allocator takes for a tensor."""
    rounded = ceil(size / ROUND_BYTES) * ROUND_BYTES
    rest = -rounded % SEGMENT_BYTES
    return rounded + rest if rounded >= LARGE_BYTES and rest <= SPLIT_BYTES else rounded


def rest_behind(size: int, next_size: int) -> int:
    """What a tensor leaves unused of the rest that the allocator has cut off behind a larger one, and given to it."""
    rest = -size % SEGMENT_BYTES
    fits = size >= LARGE_BYTES and rest > SPLIT_BYTES and SPLIT_BYTES < next_size <= rest
    return rest - next_size if fits and rest - next_size <= SPLIT_BYTES else 0


def resident_bytes(size: int) -> int:
    """The same of a tensor that lives as long as the process, at most: smaller ones share segments of 20 MiB.

    What is left of such a segment goes to its last tensor, up to a MiB.
    """
    if not SPLIT_BYTES < size < LARGE_BYTES:
        return block_bytes(size)
    return block_bytes(size) + SPLIT_BYTES // (2 * LARGE_BYTES // size)
