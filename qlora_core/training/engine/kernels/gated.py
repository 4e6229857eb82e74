"""The gated activation, with the products of the adapter behind it taken from the tiles that it makes anyway.

Every program owns a tile of one side and walks along the other. Partial sums go to memory and are added up in a fixed
order, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from qlora_core.training.engine.kernels.products import padded, split, sum_into

COLUMNS = 1024
TOKENS, WIDE = 64, 64
"""A tile of the forward pass."""
BACKWARD_TOKENS, BACKWARD_WIDE = 16, 256
PROGRAMS, BACKWARD_PROGRAMS = 4224, 2112
"""How finely they are split: 32 and 16 for each of 132 multiprocessors. All of these are the fastest of those tried."""


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=ok, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=ok, other=0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _swiglu_low(  # type: ignore[no-untyped-def]
    gate_up, a, out, lows, tokens, width, rank, chunk,
    RANK: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    row_ok, rank_ok = rows < tokens, ranks < rank
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, width), WIDE):
        columns = start + tl.arange(0, WIDE)
        column_ok = columns < width
        ok = row_ok[:, None] & column_ok[None, :]
        at = gate_up + rows[:, None].to(tl.int64) * 2 * width + columns[None, :]
        gate = tl.load(at, mask=ok, other=0).to(tl.float32)
        up = tl.load(at + width, mask=ok, other=0).to(tl.float32)
        inner = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        tl.store(out + rows[:, None].to(tl.int64) * width + columns[None, :], inner, mask=ok)
        a_at = a + ranks[None, :] * width + columns[:, None]
        a_tile = tl.load(a_at, mask=column_ok[:, None] & rank_ok[None, :], other=0)
        total += tl.dot(inner, a_tile, input_precision="ieee")
    low_at = lows + (tl.program_id(1) * tokens + rows)[:, None].to(tl.int64) * rank + ranks[None, :]
    tl.store(low_at, total, mask=row_ok[:, None] & rank_ok[None, :])


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    grad, gate_up, low_grad, outer, tokens, width, rank, chunk,
    RANK: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    columns, ranks = tl.program_id(0) * WIDE + tl.arange(0, WIDE), tl.arange(0, 16 if RANK == 0 else RANK)
    column_ok, rank_ok = columns < width, ranks < rank
    total = tl.zeros((WIDE, 16 if RANK == 0 else RANK), dtype=tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        row_ok = rows < tokens
        ok = row_ok[:, None] & column_ok[None, :]
        at = gate_up + rows[:, None].to(tl.int64) * 2 * width + columns[None, :]
        gate = tl.load(at, mask=ok, other=0).to(tl.float32)
        up = tl.load(at + width, mask=ok, other=0).to(tl.float32)
        g = tl.load(grad + rows[:, None].to(tl.int64) * width + columns[None, :], mask=ok, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(at, (g * up * slope).to(gate_up.dtype.element_ty), mask=ok)
        tl.store(at + width, (g * silu).to(gate_up.dtype.element_ty), mask=ok)
        if RANK > 0:
            inner = (silu * up).to(low_grad.dtype.element_ty)
            low_at = low_grad + rows[:, None] * rank + ranks[None, :]
            low_tile = tl.load(low_at, mask=row_ok[:, None] & rank_ok[None, :], other=0)
            total += tl.dot(tl.trans(inner), low_tile, input_precision="ieee")
    if RANK > 0:
        outer_at = outer + (tl.program_id(1) * width + columns)[:, None].to(tl.int64) * rank + ranks[None, :]
        tl.store(outer_at, total, mask=column_ok[:, None] & rank_ok[None, :])


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[tokens, 2 * width]` (arXiv:2002.05202)."""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), width)
    _swiglu[(len(out), triton.cdiv(width, COLUMNS))](gate_up, out, width, COLUMNS, num_warps=4)
    return out


def swiglu_low(gate_up: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu(gate) * up` of `[tokens, 2 * width]`, and its product with `a` `[rank, width]`, `[tokens, rank]`."""
    (tokens, both), rank = gate_up.shape, len(a)
    width = both // 2
    out, low = gate_up.new_empty(tokens, width), gate_up.new_empty(tokens, rank)
    tiles = triton.cdiv(tokens, TOKENS)
    chunk, chunks = split(width, WIDE, triton.cdiv(PROGRAMS, tiles))
    lows = torch.empty(chunks, tokens, rank, device=gate_up.device, dtype=torch.float32)
    _swiglu_low[(tiles, chunks)](
        gate_up, a, out, lows, tokens, width, rank, chunk, padded(rank), TOKENS, WIDE, num_warps=4, num_stages=3
    )
    sum_into(lows, low, 1.0, add=False)
    return out, low


def swiglu_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, low_grad: torch.Tensor | None, grad_a: torch.Tensor | None
) -> None:
    """Replace `gate_up` by its gradient; `grad_a` `[rank, width]`, fp32, gets `low_grad.T @ activation` added."""
    (tokens, width), rank = grad.shape, 0 if low_grad is None else low_grad.shape[1]
    tiles = triton.cdiv(width, BACKWARD_WIDE)
    chunk, chunks = split(tokens, BACKWARD_TOKENS, triton.cdiv(BACKWARD_PROGRAMS, tiles))
    outers = torch.empty(chunks, width, rank, device=grad.device, dtype=torch.float32)
    _swiglu_backward[(tiles, chunks)](
        grad, gate_up, grad if low_grad is None else low_grad, outers, tokens, width, rank, chunk,
        padded(rank), BACKWARD_TOKENS, BACKWARD_WIDE, num_warps=8, num_stages=3,
    )  # fmt: skip
    if grad_a is not None:
        sum_into(outers, grad_a.t(), 1.0, add=True)
