"""An adapter's products with an input of which a share is dropped: masks are made in the tiles and never written.

A mask depends on seed, number and place alone, so that forward and backward make the same one. Each program owns a
tile of one side and walks along the other. Partial sums go to memory and are added up in a fixed order, so that equal
inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from qlora_core.training.engine.kernels.products import Tiling, padded, split, sum_into
from qlora_core.training.engine.operands import Behind, Masks

COLUMNS = 1024
LOW = Tiling(tokens=64, columns=128, programs=528, warps=4, stages=3)
BACKWARD = Tiling(tokens=16, columns=128, programs=1056, warps=4, stages=3)
BACKWARD_LARGE_RANK = Tiling(tokens=64, columns=64, programs=1056, warps=8, stages=2)
LARGE_RANK = 33
"""The smallest of them: more would not fit into registers in the tiles of the others."""


@triton.jit
def keys(seed, number):  # type: ignore[no-untyped-def]
    """Of one mask."""
    first, second, _, _ = tl.randint4x(tl.load(seed), number)
    return first.to(tl.uint32), second.to(tl.uint32)


@triton.jit
def kept(at, first, second, threshold):  # type: ignore[no-untyped-def]
    """Whether the value at a place stays: a hash of 32 bits, of two rounds of multiply and shift, a key before each."""
    bits = at.to(tl.uint32) ^ first
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15) ^ second) * 0x846CA68B
    return (bits ^ (bits >> 16)) >= threshold


@triton.jit(do_not_specialize=["number", "threshold"])
def _dropout(x, out, seed, number, count, threshold, scale, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    first, second = keys(seed, number)
    keep = kept(at, first, second, threshold.to(tl.uint32))
    value = tl.where(keep, tl.load(x + at, mask=ok, other=0).to(tl.float32) * scale, 0.0)
    if ADD:
        value += tl.load(out + at, mask=ok, other=0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["number", "threshold"])
def _low(  # type: ignore[no-untyped-def]
    x, a, lows, seed, number, threshold, tokens, width, rank, chunk,
    RANK: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    which, of = tl.program_id(0), tl.num_programs(0)  # neighbours in time read the same tile of x
    rows, ranks = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    row_ok, rank_ok = rows < tokens, ranks < rank
    first, second = keys(seed, number + which)
    threshold = threshold.to(tl.uint32)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    start = tl.program_id(2) * chunk
    for at in range(start, tl.minimum(start + chunk, width), WIDE):
        columns = at + tl.arange(0, WIDE)
        column_ok = columns < width
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        tile = tl.load(x + places, mask=row_ok[:, None] & column_ok[None, :], other=0)
        tile = tl.where(kept(places, first, second, threshold), tile, 0.0).to(x.dtype.element_ty)
        a_at = a + (which * rank + ranks)[None, :] * width + columns[:, None]
        a_tile = tl.load(a_at, mask=column_ok[:, None] & rank_ok[None, :], other=0)
        total += tl.dot(tile, a_tile, input_precision="ieee")
    low_at = lows + (tl.program_id(2) * tokens + rows)[:, None].to(tl.int64) * of * rank
    low_at += which * rank + ranks[None, :]
    tl.store(low_at, total, mask=row_ok[:, None] & rank_ok[None, :])


@triton.jit
def _one(  # type: ignore[no-untyped-def]
    which, total, grad, tile, places, rows, row_ok, columns, column_ok, a, low_grad, seed, number, threshold,
    width, rank, of: tl.constexpr, INPUT: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Add what one of the adapters has to the gradients of its first matrix and of the input, both unscaled."""
    ranks = tl.arange(0, RANK)
    rank_ok = ranks < rank
    first, second = keys(seed, number + which)
    keep = kept(places, first, second, threshold)
    low_at = low_grad + rows[:, None] * of * rank + which * rank + ranks[None, :]
    low = tl.load(low_at, mask=row_ok[:, None] & rank_ok[None, :], other=0)
    dropped = tl.where(keep, tile, 0.0).to(tile.dtype)
    total += tl.dot(tl.trans(dropped), low, input_precision="ieee")
    if INPUT:
        a_at = a + (which * rank + ranks)[:, None] * width + columns[None, :]
        a_tile = tl.load(a_at, mask=rank_ok[:, None] & column_ok[None, :], other=0)
        grad += tl.where(keep, tl.dot(low, a_tile, input_precision="ieee"), 0.0)
    return total, grad


@triton.jit(do_not_specialize=["number", "threshold"])
def _backward(  # type: ignore[no-untyped-def]
    x, a, low_grad, input_grad, outer, seed, number, threshold, scale, tokens, width, rank, chunk,
    OF: tl.constexpr, INPUT: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    columns, ranks = tl.program_id(0) * WIDE + tl.arange(0, WIDE), tl.arange(0, RANK)
    column_ok = columns < width
    threshold = threshold.to(tl.uint32)
    zero = tl.zeros((WIDE, RANK), dtype=tl.float32)
    total_0, total_1, total_2 = zero, zero, zero
    start = tl.program_id(1) * chunk
    for at in range(start, tl.minimum(start + chunk, tokens), TOKENS):
        rows = at + tl.arange(0, TOKENS)
        row_ok = rows < tokens
        ok = row_ok[:, None] & column_ok[None, :]
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        tile = tl.load(x + places, mask=ok, other=0)
        grad = tl.zeros((TOKENS, WIDE), dtype=tl.float32)
        total_0, grad = _one(
            0, total_0, grad, tile, places, rows, row_ok, columns, column_ok, a, low_grad, seed, number, threshold,
            width, rank, OF, INPUT, RANK,
        )  # fmt: skip
        if OF > 1:
            total_1, grad = _one(
                1, total_1, grad, tile, places, rows, row_ok, columns, column_ok, a, low_grad, seed, number, threshold,
                width, rank, OF, INPUT, RANK,
            )  # fmt: skip
        if OF > 2:
            total_2, grad = _one(
                2, total_2, grad, tile, places, rows, row_ok, columns, column_ok, a, low_grad, seed, number, threshold,
                width, rank, OF, INPUT, RANK,
            )  # fmt: skip
        if INPUT:
            grad = tl.load(input_grad + places, mask=ok, other=0).to(tl.float32) + grad * scale
            tl.store(input_grad + places, grad.to(input_grad.dtype.element_ty), mask=ok)
    outer_at = outer + (tl.program_id(1) * width + columns)[:, None].to(tl.int64) * OF * rank + ranks[None, :]
    ok = column_ok[:, None] & (ranks < rank)[None, :]
    tl.store(outer_at, total_0, mask=ok)
    if OF > 1:
        tl.store(outer_at + rank, total_1, mask=ok)
    if OF > 2:
        tl.store(outer_at + 2 * rank, total_2, mask=ok)


def dropout(x: torch.Tensor, masks: Masks, add_to: torch.Tensor | None) -> torch.Tensor:
    """`x` with a share of its values zeroed and the rest scaled up; see `ops.dropout`."""
    out = torch.empty_like(x) if add_to is None else add_to
    _dropout[(triton.cdiv(x.numel(), COLUMNS),)](
        x, out, masks.seed, masks.number, x.numel(), threshold_of(masks), scale_of(masks), add_to is not None, COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out


def dropped_low(x: torch.Tensor, a: torch.Tensor, masks: Masks) -> torch.Tensor:
    """The products of adapters with what dropout leaves of `x`; see `ops.dropped_low`."""
    (tokens, width), rank = x.shape, len(a) // masks.count
    tiles = triton.cdiv(tokens, LOW.tokens)
    chunk, chunks = split(width, LOW.columns, LOW.programs // (tiles * masks.count))
    lows = torch.empty(chunks, tokens, len(a), device=x.device, dtype=torch.float32)
    _low[(masks.count, tiles, chunks)](
        x, a, lows, masks.seed, masks.number, threshold_of(masks), tokens, width, rank, chunk, padded(rank), LOW.tokens,
        LOW.columns, num_warps=LOW.warps, num_stages=LOW.stages,
    )  # fmt: skip
    low = x.new_empty(tokens, len(a))
    sum_into(lows, low, scale_of(masks), add=False)
    return low


def low_backward(behind: Behind, masks: Masks, x: torch.Tensor, input_grad: torch.Tensor | None) -> None:
    """Gradients of what `dropped_low` computes; see `ops.low_backward`. A group has at most three adapters."""
    low_grad, a, grad_a, _ = behind
    (tokens, width), together = x.shape, low_grad.shape[1]
    rank = together // masks.count
    tiling = BACKWARD if rank < LARGE_RANK else BACKWARD_LARGE_RANK
    tiles = triton.cdiv(width, tiling.columns)
    chunk, chunks = split(tokens, tiling.tokens, tiling.programs // tiles)
    outers = torch.empty(chunks, width, together, device=x.device, dtype=torch.float32)
    wanted = a is not None and input_grad is not None
    _backward[(tiles, chunks)](
        x, a if wanted else x, low_grad, input_grad if wanted else x, outers, masks.seed, masks.number,
        threshold_of(masks), scale_of(masks), tokens, width, rank, chunk, masks.count, wanted, padded(rank),
        tiling.tokens, tiling.columns, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    sum_into(outers, grad_a.t(), scale_of(masks), add=True)


def threshold_of(masks: Masks) -> int:
    """Hashes below it are dropped."""
    return min(round(masks.rate * 2**32), 2**32 - 1)


def scale_of(masks: Masks) -> float:
    """Of what stays."""
    return 1 / (1 - masks.rate)
