"""The gated activation, with the products of the adapter behind it taken from the tiles that it makes anyway.

Every program owns a tile of one side and walks along the other. Partial sums go to memory and are added up in a fixed
order, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from qlora_core.training.engine.kernels.dropped import kept, keys, scale_of, threshold_of
from qlora_core.training.engine.kernels.products import SMALLEST_DOT, Tiling, padded, split, sum_into
from qlora_core.training.engine.operands import Behind, Lift, Masks

COLUMNS = 1024
FORWARD = Tiling(tokens=32, columns=128, programs=4224, warps=4, stages=3)
LIFTED = Tiling(tokens=64, columns=64, programs=1056, warps=4, stages=3)
BACKWARD = Tiling(tokens=64, columns=64, programs=1056, warps=4, stages=3)
BACKWARD_APART = Tiling(tokens=32, columns=64, programs=1056, warps=4, stages=3)


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=ok, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=ok, other=0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _lifts(low, b, rows, row_ok, columns, column_ok, width, rank, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What adapters that stand apart add to a tile of gate and to one of up."""
    ranks = tl.arange(0, RANK)
    low_ok, b_ok = row_ok[:, None] & (ranks < rank)[None, :], (ranks < rank)[:, None] & column_ok[None, :]
    low_at, b_at = low + rows[:, None] * 2 * rank + ranks[None, :], b + columns[None, :] * rank + ranks[:, None]
    gate = tl.dot(tl.load(low_at, mask=low_ok, other=0), tl.load(b_at, mask=b_ok, other=0), input_precision="ieee")
    low_tile, b_tile = tl.load(low_at + rank, mask=low_ok, other=0), tl.load(b_at + width * rank, mask=b_ok, other=0)
    return gate, tl.dot(low_tile, b_tile, input_precision="ieee")


@triton.jit(do_not_specialize=["number", "threshold"])
def _swiglu_low(  # type: ignore[no-untyped-def]
    gate_up, a, out, lows, lift_low, lift_b, seed, number, threshold, tokens, width, rank, chunk,
    LIFT: tl.constexpr, DROP: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    row_ok, rank_ok = rows < tokens, ranks < rank
    if DROP:
        key, other_key = keys(seed, number)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, width), WIDE):
        columns = start + tl.arange(0, WIDE)
        column_ok = columns < width
        ok = row_ok[:, None] & column_ok[None, :]
        at = gate_up + rows[:, None].to(tl.int64) * 2 * width + columns[None, :]
        gate = tl.load(at, mask=ok, other=0).to(tl.float32)
        up = tl.load(at + width, mask=ok, other=0).to(tl.float32)
        if LIFT:
            more_gate, more_up = _lifts(lift_low, lift_b, rows, row_ok, columns, column_ok, width, rank, RANK)
            gate, up = gate + more_gate, up + more_up
        inner = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(out + places, inner, mask=ok)
        keep = ok  # also without dropout: a copy of its own for the product leaves the stored one in a layout to store
        if DROP:
            keep = kept(places, key, other_key, threshold.to(tl.uint32))
        inner = tl.where(keep, inner, 0.0).to(out.dtype.element_ty)
        a_at = a + ranks[None, :] * width + columns[:, None]
        a_tile = tl.load(a_at, mask=column_ok[:, None] & rank_ok[None, :], other=0)
        total += tl.dot(inner, a_tile, input_precision="ieee")
    low_at = lows + (tl.program_id(1) * tokens + rows)[:, None].to(tl.int64) * rank + ranks[None, :]
    tl.store(low_at, total, mask=row_ok[:, None] & rank_ok[None, :])


@triton.jit(do_not_specialize=["number", "threshold"])
def _swiglu_backward(  # type: ignore[no-untyped-def]
    grad, gate_up, low_grad, a, outer, lift_low, lift_b, seed, number, threshold, scale, tokens, width, rank, chunk,
    LIFT: tl.constexpr, DROP: tl.constexpr, APART: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    columns, ranks = tl.program_id(0) * WIDE + tl.arange(0, WIDE), tl.arange(0, 16 if RANK == 0 else RANK)
    column_ok, rank_ok = columns < width, ranks < rank
    if DROP:
        key, other_key = keys(seed, number)
    total = tl.zeros((WIDE, 16 if RANK == 0 else RANK), dtype=tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        row_ok = rows < tokens
        ok = row_ok[:, None] & column_ok[None, :]
        at = gate_up + rows[:, None].to(tl.int64) * 2 * width + columns[None, :]
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        gate = tl.load(at, mask=ok, other=0).to(tl.float32)
        up = tl.load(at + width, mask=ok, other=0).to(tl.float32)
        g = tl.load(grad + places, mask=ok, other=0).to(tl.float32)
        if LIFT:
            more_gate, more_up = _lifts(lift_low, lift_b, rows, row_ok, columns, column_ok, width, rank, RANK)
            gate, up = gate + more_gate, up + more_up
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if RANK > 0:
            inner = (silu * up).to(low_grad.dtype.element_ty)
            low_at = low_grad + rows[:, None] * rank + ranks[None, :]
            low_tile = tl.load(low_at, mask=row_ok[:, None] & rank_ok[None, :], other=0)
            if DROP:
                keep = kept(places, key, other_key, threshold.to(tl.uint32))
                inner = tl.where(keep, inner, 0.0).to(low_grad.dtype.element_ty)
            total += tl.dot(tl.trans(inner), low_tile, input_precision="ieee")
            if APART:
                a_at = a + ranks[:, None] * width + columns[None, :]
                a_tile = tl.load(a_at, mask=rank_ok[:, None] & column_ok[None, :], other=0)
                more = tl.dot(low_tile, a_tile, input_precision="ieee")
                if DROP:
                    more = tl.where(keep, more * scale, 0.0)
                g += more
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(at, (g * up * slope).to(gate_up.dtype.element_ty), mask=ok)
        tl.store(at + width, (g * silu).to(gate_up.dtype.element_ty), mask=ok)
    if RANK > 0:
        outer_at = outer + (tl.program_id(1) * width + columns)[:, None].to(tl.int64) * rank + ranks[None, :]
        tl.store(outer_at, total, mask=column_ok[:, None] & rank_ok[None, :])


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[tokens, 2 * width]` (arXiv:2002.05202)."""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), width)
    _swiglu[(len(out), triton.cdiv(width, COLUMNS))](gate_up, out, width, COLUMNS, num_warps=4)
    return out


def swiglu_low(
    gate_up: torch.Tensor, a: torch.Tensor, masks: Masks | None, lift: Lift | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of `[tokens, 2 * width]`, and what `a` `[rank, width]` makes of it; see `ops.swiglu`."""
    (tokens, both), rank, tiling = gate_up.shape, len(a), FORWARD if lift is None else LIFTED
    width = both // 2
    out, low = gate_up.new_empty(tokens, width), gate_up.new_empty(tokens, rank)
    tiles = triton.cdiv(tokens, tiling.tokens)
    chunk, chunks = split(width, tiling.columns, _share(tiling, tiles, rank))
    lows = torch.empty(chunks, tokens, rank, device=gate_up.device, dtype=torch.float32)
    _swiglu_low[(tiles, chunks)](
        gate_up, a, out, lows, *(lift or (a, a)), *_of(masks, a), tokens, width, rank, chunk,
        lift is not None, masks is not None, padded(rank), tiling.tokens, tiling.columns, num_warps=tiling.warps,
        num_stages=tiling.stages,
    )  # fmt: skip
    sum_into(lows, low, 1.0 if masks is None else scale_of(masks), add=False)
    return out, low


def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor, behind: Behind | None, lift: Lift | None) -> None:
    """Replace `gate_up` `[tokens, 2 * width]` by its gradient; see `ops.swiglu_backward`."""
    (tokens, width), rank = grad.shape, 0 if behind is None else behind.low_grad.shape[1]
    low_grad, a, grad_a, masks = behind or (grad, None, None, None)
    tiling = BACKWARD if masks is None and lift is None else BACKWARD_APART
    tiles = triton.cdiv(width, tiling.columns)
    chunk, chunks = split(tokens, tiling.tokens, _share(tiling, tiles, rank))
    outers = torch.empty(chunks, width, rank, device=grad.device, dtype=torch.float32)
    scale = 1.0 if masks is None else scale_of(masks)
    _swiglu_backward[(tiles, chunks)](
        grad, gate_up, low_grad, grad if a is None else a, outers, *(lift or (grad, grad)), *_of(masks, grad), scale,
        tokens, width, rank, chunk, lift is not None, masks is not None, a is not None, padded(rank), tiling.tokens,
        tiling.columns, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    if grad_a is not None:
        sum_into(outers, grad_a.t(), scale, add=True)


def _share(tiling: Tiling, tiles: int, rank: int) -> int:
    """Pieces of the side that is walked along; fewer for larger ranks, as partial sums grow with them."""
    pieces: int = triton.cdiv(tiling.programs * SMALLEST_DOT, tiles * max(SMALLEST_DOT, padded(rank)))
    return pieces


def _of(masks: Masks | None, instead: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Seed, number and threshold, or what is never read."""
    return (instead, 0, 0) if masks is None else (masks.seed, masks.number, threshold_of(masks))
