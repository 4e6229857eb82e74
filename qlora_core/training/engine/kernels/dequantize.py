"""4- and 8-bit weights to the compute dtype, with the adapter's `B @ A` added in fp32 before the one rounding.

The adapter then costs no pass over the wide outputs of a linear, neither forward nor backward.
"""

import torch
import triton
import triton.language as tl

from qlora_core.training.engine.kernels.products import padded

BLOCK_VALUES = 64
"""Values that share a scale in bitsandbytes' 4-bit formats."""
TILE, SMALL_TILE = (64, 2), (32, 1)
"""Of a program: rows of the weight, and blocks of each; the small one for what else would not fit into registers.

These kernels are bound by instructions before they are by memory. With two blocks a row there are 10 a value where one
and codes from global memory took 14 (GPTQ in one group: 29), as Triton compiles them for Hopper. An H100 then moves 2.0
to 2.2 TB/s in the wide linears of 1.5B and 7B models; of nine other tilings none is faster at all of them.
"""
MANY_RANKS = 128


@triton.jit
def _add_product(values, a, b, rows, row_ok, columns, column_ok, inputs, rank, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    ranks = tl.arange(0, RANK)
    b_tile = tl.load(b + rows[:, None] * rank + ranks[None, :], mask=row_ok[:, None] & (ranks < rank)[None, :], other=0)
    a_at = a + ranks[:, None] * inputs + columns[None, :]
    a_tile = tl.load(a_at, mask=(ranks < rank)[:, None] & column_ok[None, :], other=0)
    return values + tl.dot(b_tile, a_tile, input_precision="ieee")


@triton.jit
def _dequantize_4bit(  # type: ignore[no-untyped-def]
    packed, scales, nested_code, nested_scales, offset, code, a, b, out, outputs, inputs, rank, out_stride,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < outputs
    blocks = inputs // 64
    first = tl.program_id(0) * BLOCKS  # neighbours in time are neighbours in memory
    block = first + tl.arange(0, BLOCKS)
    number, ok = rows[:, None] * blocks + block[None, :], row_ok[:, None] & (block < blocks)[None, :]
    if NESTED:
        index = tl.load(scales + number, mask=ok, other=0).to(tl.int32)
        scale = tl.load(nested_code + index) * tl.load(nested_scales + number // NESTED_BLOCK, mask=ok, other=0)
        scale += tl.load(offset)
    else:
        scale = tl.load(scales + number, mask=ok, other=0)
    byte = first * 32 + tl.arange(0, BLOCKS * 32)
    byte_ok = row_ok[:, None] & (byte < blocks * 32)[None, :]
    pairs = tl.load(packed + rows[:, None] * (blocks * 32) + byte[None, :], mask=byte_ok, other=0).to(tl.int32)
    quants = tl.reshape(tl.interleave(pairs >> 4, pairs & 15), (ROWS * BLOCKS * 64,))
    values = tl.gather(tl.load(code + tl.arange(0, 16)), quants, 0)  # through shared memory: a third fewer instructions
    values = tl.reshape(tl.reshape(values, (ROWS, BLOCKS, 64)) * scale[:, :, None], (ROWS, BLOCKS * 64))
    columns = first * 64 + tl.arange(0, BLOCKS * 64)
    column_ok = columns < inputs
    if RANK > 0:
        values = _add_product(values, a, b, rows, row_ok, columns, column_ok, inputs, rank, RANK)
    at = out + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _dequantize_gptq(  # type: ignore[no-untyped-def]
    packed, scales, zeros, groups, a, b, out, outputs, inputs, rank, out_stride, group_size,
    BITS: tl.constexpr, ZERO_OFFSET: tl.constexpr, ONE_GROUP: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = rows < outputs, columns < inputs
    ok = row_ok[:, None] & column_ok[None, :]
    word = tl.program_id(1) * (COLUMNS // PER_WORD) + tl.arange(0, COLUMNS // PER_WORD)
    word_ok = (word < inputs // PER_WORD)[:, None] & row_ok[None, :]
    words = tl.load(packed + word[:, None] * outputs + rows[None, :], mask=word_ok, other=0)
    quants = (words[:, None, :] >> (tl.arange(0, PER_WORD) * BITS)[None, :, None]) & MASK
    quants = tl.trans(tl.reshape(quants, (COLUMNS, ROWS)))
    zero_place, zero_shift = rows // PER_WORD, (rows % PER_WORD * BITS)[:, None]
    if ONE_GROUP:
        group = tl.program_id(1) * COLUMNS // group_size
        scale = tl.load(scales + group * outputs + rows, mask=row_ok, other=0)[:, None]
        zero_words = tl.load(zeros + group * (outputs // PER_WORD) + zero_place, mask=row_ok, other=0)[:, None]
    else:
        group = tl.load(groups + columns, mask=column_ok, other=0)[None, :]
        scale = tl.load(scales + group * outputs + rows[:, None], mask=ok, other=0)
        zero_words = tl.load(zeros + group * (outputs // PER_WORD) + zero_place[:, None], mask=ok, other=0)
    zero = ((zero_words >> zero_shift) & MASK) + ZERO_OFFSET
    values = (quants - zero).to(tl.float32) * scale.to(tl.float32)
    if RANK > 0:
        values = _add_product(values, a, b, rows, row_ok, columns, column_ok, inputs, rank, RANK)
    at = out + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=ok)


def dequantize_4bit(
    packed: torch.Tensor,
    scales: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None,
    code: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill `out` `[outputs, inputs]` with the weights of bitsandbytes' 4-bit form (blocks of 64) plus `b @ a`.

    Args:
        packed: two values a byte, the first in the high half.
        scales: one a block: fp32, or a byte each when they are quantized themselves.
        nested: how quantized scales are read: their code, their own scales, the offset, values a scale.
        code: the 16 values.
        a: `[rank, inputs]`, or None without an adapter.
        b: `[outputs, rank]`, already scaled.
        out: its rows may be apart.
    """
    outputs, inputs = out.shape
    rank = 0 if a is None else a.shape[0]
    nested_code, nested_scales, offset, nested_block = nested or (code, code, code, 1)
    rows, blocks = _tile(out, rank)
    grid = (triton.cdiv(inputs // BLOCK_VALUES, blocks), triton.cdiv(outputs, rows))
    _dequantize_4bit[grid](
        packed, scales, nested_code, nested_scales, offset, code, out if a is None else a, out if b is None else b,
        out, outputs, inputs, rank, out.stride(0), nested is not None, nested_block, padded(rank), rows, blocks,
        num_warps=4,
    )  # fmt: skip


def dequantize_gptq(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    group_size: int,
    bits: int,
    zero_offset: int,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill `out` `[outputs, inputs]` with the weights of a GPTQ linear plus `b @ a`.

    Args:
        packed: `[inputs * bits / 32, outputs]`, int32.
        scales: `[groups, outputs]`.
        zeros: `[groups, outputs * bits / 32]`, int32.
        groups: `[inputs]`, the group of every input.
        group_size: inputs of a group, where they are neighbours; else 0.
        bits: 4 or 8.
        zero_offset: 1 for checkpoint format v1, which stores zeros less one.
        a: `[rank, inputs]`, or None without an adapter.
        b: `[outputs, rank]`, already scaled.
        out: its rows may be apart.
    """
    outputs, inputs = out.shape
    rank = 0 if a is None else a.shape[0]
    rows, blocks = _tile(out, rank)
    columns = blocks * BLOCK_VALUES
    one_group = group_size > 0 and group_size % columns == 0
    _dequantize_gptq[(triton.cdiv(outputs, rows), triton.cdiv(inputs, columns))](
        packed, scales, zeros, groups, out if a is None else a, out if b is None else b, out, outputs, inputs, rank,
        out.stride(0), group_size, bits, zero_offset, one_group, padded(rank), rows, columns, num_warps=4,
    )  # fmt: skip


def _tile(out: torch.Tensor, rank: int) -> tuple[int, int]:
    return TILE if rank <= MANY_RANKS and out.itemsize == 2 else SMALL_TILE
