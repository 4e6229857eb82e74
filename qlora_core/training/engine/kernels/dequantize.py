"""4- and 8-bit weights to the compute dtype, with the adapter's `B @ A` added in fp32 before the one rounding.

The adapter then costs no pass over the wide outputs of a linear, neither forward nor backward.
"""

import torch
import triton
import triton.language as tl

from qlora_core.training.engine.kernels.products import padded

BLOCK_VALUES = 64
"""Values that share a scale in bitsandbytes' 4-bit formats; one tile is one such block wide."""


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
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < outputs
    blocks = inputs // 64
    block = tl.program_id(0)  # neighbours in time are neighbours in memory
    number = rows * blocks + block
    if NESTED:
        index = tl.load(scales + number, mask=row_ok, other=0).to(tl.int32)
        scale = tl.load(nested_code + index) * tl.load(nested_scales + number // NESTED_BLOCK, mask=row_ok, other=0)
        scale += tl.load(offset)
    else:
        scale = tl.load(scales + number, mask=row_ok, other=0)
    pairs = tl.load(packed + number[:, None] * 32 + tl.arange(0, 32)[None, :], mask=row_ok[:, None], other=0)
    pairs = pairs.to(tl.int32)
    values = tl.interleave(tl.load(code + (pairs >> 4)), tl.load(code + (pairs & 15))) * scale[:, None]
    columns = block * 64 + tl.arange(0, 64)
    if RANK > 0:
        values = _add_product(values, a, b, rows, row_ok, columns, columns < inputs, inputs, rank, RANK)
    at = out + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def _dequantize_gptq(  # type: ignore[no-untyped-def]
    packed, scales, zeros, groups, a, b, out, outputs, inputs, rank, out_stride,
    BITS: tl.constexpr, ZERO_OFFSET: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // BITS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 64 + tl.arange(0, 64)
    row_ok, column_ok = rows < outputs, columns < inputs
    ok = row_ok[:, None] & column_ok[None, :]
    words = tl.load(packed + (columns // PER_WORD)[None, :] * outputs + rows[:, None], mask=ok, other=0)
    quants = (words >> ((columns % PER_WORD) * BITS)[None, :]) & ((1 << BITS) - 1)
    group = tl.load(groups + columns, mask=column_ok, other=0)
    zero_words = tl.load(zeros + group[None, :] * (outputs // PER_WORD) + (rows // PER_WORD)[:, None], mask=ok, other=0)
    zero = ((zero_words >> ((rows % PER_WORD) * BITS)[:, None]) & ((1 << BITS) - 1)) + ZERO_OFFSET
    scale = tl.load(scales + group[None, :] * outputs + rows[:, None], mask=ok, other=0).to(tl.float32)
    values = (quants - zero).to(tl.float32) * scale
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
    rows = 64 if rank <= 64 else 32
    grid = (inputs // BLOCK_VALUES, triton.cdiv(outputs, rows))
    _dequantize_4bit[grid](
        packed, scales, nested_code, nested_scales, offset, code, out if a is None else a, out if b is None else b,
        out, outputs, inputs, rank, out.stride(0), nested is not None, nested_block, padded(rank), rows, num_warps=4,
    )  # fmt: skip


def dequantize_gptq(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
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
        bits: 4 or 8.
        zero_offset: 1 for checkpoint format v1, which stores zeros less one.
        a: `[rank, inputs]`, or None without an adapter.
        b: `[outputs, rank]`, already scaled.
        out: its rows may be apart.
    """
    outputs, inputs = out.shape
    rank = 0 if a is None else a.shape[0]
    rows = 64 if rank <= 64 else 32
    _dequantize_gptq[(triton.cdiv(outputs, rows), triton.cdiv(inputs, 64))](
        packed, scales, zeros, groups, out if a is None else a, out if b is None else b, out, outputs, inputs, rank,
        out.stride(0), bits, zero_offset, padded(rank), rows, num_warps=4,
    )  # fmt: skip
