"""The products of an adapter's backward that read wide matrices, in one pass over them.

Every program owns a strip of columns and a chunk of tokens. Partial sums go to memory and are added up in a fixed
order, so that equal inputs give equal bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SMALLEST_DOT = 16
SUMMED_ROWS = 8


class Tiling(NamedTuple):
    """How a kernel goes through a matrix: what a program takes at a time, and how many programs share the work.

    All of those in use are the fastest of those tried on an H100, which has 132 multiprocessors. More programs hide
    more latency, and write more partial sums.
    """

    tokens: int
    columns: int
    programs: int
    warps: int
    stages: int


BOTH_SIDES = Tiling(tokens=32, columns=512, programs=264, warps=8, stages=3)
BOTH_SIDES_OF_MANY_RANKS = Tiling(tokens=32, columns=256, programs=264, warps=8, stages=3)
MANY_RANKS = 32
"""Ranks of all parts together, from beyond which a wide tile's sums would not fit into registers."""


@triton.jit
def _both_sides(  # type: ignore[no-untyped-def]
    x, m, u, low, outer, tokens, width, rank, x_stride, m_width, m_rank, u_stride, chunk,
    PARTS: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    columns, ranks = tl.program_id(0) * WIDE + tl.arange(0, WIDE), tl.arange(0, PARTS * RANK)
    part, inside = ranks // RANK, ranks % RANK
    column_ok, rank_ok, together = columns < width, inside < rank, PARTS * rank
    places = part * rank + inside
    of_part = column_ok[:, None] & rank_ok[None, :] & ((columns % PARTS)[:, None] == part[None, :])
    stacked = columns // PARTS + columns % PARTS * (width // PARTS)
    m_tile = tl.load(m + stacked[:, None] * m_width + inside[None, :] * m_rank, mask=of_part, other=0)
    total = tl.zeros((WIDE, PARTS * RANK), dtype=tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), TALL):
        rows = start + tl.arange(0, TALL)
        row_ok = rows < tokens
        at = x + rows[:, None].to(tl.int64) * x_stride + columns[None, :]
        x_tile = tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0)
        ok = row_ok[:, None] & rank_ok[None, :]
        u_tile = tl.load(u + rows[:, None] * u_stride + places[None, :], mask=ok, other=0)
        low_at = low + (tl.program_id(0) * tokens + rows)[:, None].to(tl.int64) * together + places[None, :]
        tl.store(low_at, tl.dot(x_tile, m_tile, input_precision="ieee"), mask=ok)
        total += tl.dot(tl.trans(x_tile), u_tile, input_precision="ieee")
    outer_at = outer + (tl.program_id(1) * width + stacked)[:, None].to(tl.int64) * rank + inside[None, :]
    tl.store(outer_at, total, mask=of_part)


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    partial, out, parts, rows, width, row_stride, column_stride, scale,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    ok = (row < rows)[:, None] & (column < width)[None, :]
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for part in range(parts):
        at = partial + (part * rows + row)[:, None].to(tl.int64) * width + column[None, :]
        total += tl.load(at, mask=ok, other=0)
    total *= scale
    place = out + row[:, None].to(tl.int64) * row_stride + column[None, :] * column_stride
    if ADD:
        total += tl.load(place, mask=ok, other=0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=ok)


def padded(rank: int) -> int:
    """A rank as the matrix units take it; 0 stays 0, for no adapter."""
    return 0 if rank == 0 else max(SMALLEST_DOT, triton.next_power_of_2(rank))


def split(length: int, block: int, wanted: int) -> tuple[int, int]:
    """Length, in whole blocks, and number of about so many pieces."""
    chunk = triton.cdiv(triton.cdiv(length, max(1, wanted)), block) * block
    return chunk, triton.cdiv(length, chunk)


def sum_into(partial: torch.Tensor, out: torch.Tensor, scale: float, add: bool) -> None:
    """Sum `partial` `[parts, rows, width]` into `out` `[rows, width]`, in order."""
    parts, rows, width = partial.shape
    _add_up[(triton.cdiv(rows, SUMMED_ROWS),)](
        partial, out, parts, rows, width, out.stride(0), out.stride(1), scale, add, SUMMED_ROWS,
        triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


def both_sides(
    x: torch.Tensor,
    m: torch.Tensor,
    u: torch.Tensor,
    low: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    parts: int = 1,
) -> None:
    """`low = x @ m` and `grad += scale * x.T @ u`, reading `x` once; see `ops.both_sides`.

    Args:
        x: `[tokens, width]`, rows may be apart.
        m: `[width, rank]`, any strides.
        u: `[tokens, parts * rank]`, rows may be apart.
        low: `[tokens, parts * rank]`, any strides.
        grad: `[width, rank]` in fp32, any strides.
        scale: of what is added.
        parts: 1 or 2.
    """
    (tokens, width), rank = x.shape, m.shape[1]
    together = parts * rank
    tiling = BOTH_SIDES if parts * padded(rank) <= MANY_RANKS else BOTH_SIDES_OF_MANY_RANKS
    tiles = triton.cdiv(width, tiling.columns)
    wanted = max(1, min(tiling.programs // tiles, triton.cdiv(tokens, 4 * tiling.tokens)))
    chunk, chunks = split(tokens, tiling.tokens, wanted)
    lows = torch.empty(tiles, tokens, together, device=x.device, dtype=torch.float32)
    outers = torch.empty(chunks, width, rank, device=x.device, dtype=torch.float32)
    _both_sides[(tiles, chunks)](
        x, m, u, lows, outers, tokens, width, rank, x.stride(0), m.stride(0), m.stride(1), u.stride(0), chunk, parts,
        padded(rank), tiling.columns, tiling.tokens, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    sum_into(lows, low, 1.0, add=False)
    sum_into(outers, grad, scale, add=True)
