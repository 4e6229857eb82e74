"""The products of an adapter's backward that read wide matrices, in one pass over them.

Every program owns a strip of columns and a chunk of tokens. Partial sums go to memory and are added up in a fixed
order, so that equal inputs give equal bits.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qlora_core.training.pass_memory import SUMS_COLUMNS

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


BOTH_SIDES = Tiling(tokens=32, columns=SUMS_COLUMNS, programs=264, warps=8, stages=3)
BOTH_SIDES_OF_MANY_RANKS = Tiling(tokens=32, columns=SUMS_COLUMNS // 2, programs=264, warps=8, stages=3)
MOST_PARTS = 3
MANY_RANKS = 32
"""Ranks of a tile, beyond which a wide one's sums would not fit into registers."""


@triton.jit
def _both_sides(  # type: ignore[no-untyped-def]
    x, m, u, lows, outer, tokens, rank, x_stride, m_width, m_rank, u_stride, chunk, all_columns,
    at_0, at_1, at_2, width_0, width_1, width_2, tile_1, tile_2,
    INTERLEAVED: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if INTERLEAVED:  # ranks of both parts stand beside each other, and a column has zeros in those of the other one
        columns, ranks = tile * WIDE + tl.arange(0, WIDE), tl.arange(0, 2 * RANK)
        inside, width, lows_width = ranks % RANK, all_columns, 2 * rank
        stacked = columns // 2 + columns % 2 * (width // 2)
        rank_ok, column_ok = inside < rank, columns < width
        of_part = column_ok[:, None] & rank_ok[None, :] & ((columns % 2)[:, None] == (ranks // RANK)[None, :])
        low_ranks = ranks // RANK * rank + inside
        u_ranks = low_ranks
    else:
        part = (tile >= tile_1).to(tl.int32) + (tile >= tile_2).to(tl.int32)
        tile_0 = tl.where(part == 0, 0, tl.where(part == 1, tile_1, tile_2))
        offsets, ranks = (tile - tile_0) * WIDE + tl.arange(0, WIDE), tl.arange(0, RANK)
        inside, lows_width = ranks, rank
        width = tl.where(part == 0, width_0, tl.where(part == 1, width_1, width_2))
        columns = offsets + tl.where(part == 0, at_0, tl.where(part == 1, at_1, at_2))
        stacked = offsets + tl.where(part == 0, 0, tl.where(part == 1, width_0, width_0 + width_1))
        rank_ok, column_ok = ranks < rank, offsets < width
        of_part = column_ok[:, None] & rank_ok[None, :]
        low_ranks, u_ranks = ranks, part * rank + ranks
    m_tile = tl.load(m + stacked[:, None] * m_width + inside[None, :] * m_rank, mask=of_part, other=0)
    total = tl.zeros(m_tile.shape, dtype=tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), TALL):
        rows = start + tl.arange(0, TALL)
        row_ok = rows < tokens
        at = x + rows[:, None].to(tl.int64) * x_stride + columns[None, :]
        x_tile = tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0)
        ok = row_ok[:, None] & rank_ok[None, :]
        u_tile = tl.load(u + rows[:, None] * u_stride + u_ranks[None, :], mask=ok, other=0)
        low_at = lows + (tile * tokens + rows)[:, None].to(tl.int64) * lows_width + low_ranks[None, :]
        tl.store(low_at, tl.dot(x_tile, m_tile, input_precision="ieee"), mask=ok)
        total += tl.dot(tl.trans(x_tile), u_tile, input_precision="ieee")
    outer_at = outer + (tl.program_id(1) * (width_0 + width_1 + width_2) + stacked)[:, None].to(tl.int64) * rank
    tl.store(outer_at + inside[None, :], total, mask=of_part)


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    partial, out, first, last, block, rows, width, row_stride, column_stride, scale,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum one block of rows of the parts from `first` to before `last`, in order."""
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    ok = (row < rows)[:, None] & (column < width)[None, :]
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for part in range(first, last):
        at = partial + (part * rows + row)[:, None].to(tl.int64) * width + column[None, :]
        total += tl.load(at, mask=ok, other=0)
    total *= scale
    place = out + row[:, None].to(tl.int64) * row_stride + column[None, :] * column_stride
    if ADD:
        total += tl.load(place, mask=ok, other=0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _sum_into(  # type: ignore[no-untyped-def]
    partial, out, parts, rows, width, row_stride, column_stride, scale,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    _sum(
        partial, out, 0, parts, tl.program_id(0), rows, width, row_stride, column_stride, scale, ADD, ROWS, WIDTH
    )  # fmt: skip


@triton.jit
def _sum_both_sides(  # type: ignore[no-untyped-def]
    lows, low, outer, grad, tokens, lows_width, low_row, low_column, chunks, rows, rank, grad_row, grad_column, scale,
    tile_1, tile_2, tiles, blocks, low_blocks,
    ROWS: tl.constexpr, LOWS_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The first programs sum what is low, part by part, and the others what is a gradient."""
    program = tl.program_id(0)
    if program < low_blocks:
        part = program // blocks
        first = tl.where(part == 0, 0, tl.where(part == 1, tile_1, tile_2))
        last = tl.where(part == 0, tile_1, tl.where(part == 1, tile_2, tiles))
        out = low + part * lows_width * low_column
        _sum(
            lows, out, first, last, program % blocks, tokens, lows_width, low_row, low_column, 1.0,
            False, ROWS, LOWS_WIDTH,
        )  # fmt: skip
    else:
        _sum(
            outer, grad, 0, chunks, program - low_blocks, rows, rank, grad_row, grad_column, scale, True, ROWS, WIDTH
        )  # fmt: skip


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
    _sum_into[(triton.cdiv(rows, SUMMED_ROWS),)](
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
    parts: Sequence[slice],
) -> None:
    """`low = x @ m` and `grad += scale * x.T @ u`, reading `x` once; see `ops.both_sides`.

    Args:
        x: `[tokens, width]`, rows may be apart.
        m: `[widths, rank]`, any strides.
        u: `[tokens, parts * rank]`, rows may be apart.
        low: `[tokens, parts * rank]`, any strides.
        grad: `[widths, rank]` in fp32, any strides.
        scale: of what is added.
        parts: their columns; up to three, or two that are interleaved and all that there is.
    """
    (tokens, width), rank = x.shape, m.shape[1]
    spans = [range(*part.indices(width)) for part in parts]
    interleaved = spans[0].step == 2
    together = 2 * rank if interleaved else rank
    tiling = BOTH_SIDES if (1 + interleaved) * padded(rank) <= MANY_RANKS else BOTH_SIDES_OF_MANY_RANKS
    tiles = (
        [triton.cdiv(width, tiling.columns)] if interleaved else [triton.cdiv(len(s), tiling.columns) for s in spans]
    )
    ends = [*accumulate(tiles), sum(tiles), sum(tiles)]
    wanted = max(1, min(tiling.programs // ends[-1], triton.cdiv(tokens, 4 * tiling.tokens)))
    chunk, chunks = split(tokens, tiling.tokens, wanted)
    lows = torch.empty(ends[-1], tokens, together, device=x.device, dtype=torch.float32)
    outers = torch.empty(chunks, len(m), rank, device=x.device, dtype=torch.float32)
    absent = [0] * (MOST_PARTS - len(parts))
    starts, widths = [s.start for s in spans] + absent, [len(s) for s in spans] + absent
    _both_sides[(ends[-1], chunks)](
        x, m, u, lows, outers, tokens, rank, x.stride(0), m.stride(0), m.stride(1), u.stride(0), chunk, width,
        *starts, *widths, *ends[:2], interleaved, padded(rank), tiling.columns, tiling.tokens,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    blocks = triton.cdiv(tokens, SUMMED_ROWS)
    low_blocks = blocks * len(tiles)
    _sum_both_sides[(low_blocks + triton.cdiv(len(m), SUMMED_ROWS),)](
        lows, low, outers, grad, tokens, together, low.stride(0), low.stride(1), chunks, len(m), rank, grad.stride(0),
        grad.stride(1), scale, *ends[:2], ends[-1], blocks, low_blocks, SUMMED_ROWS,
        triton.next_power_of_2(together), triton.next_power_of_2(rank), num_warps=4,
    )  # fmt: skip
