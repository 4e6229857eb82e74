"""Norms and rotary embedding, each one pass over memory; arithmetic in fp32."""

import torch
import triton
import triton.language as tl

COLUMNS = 1024
HEADS = 8


@triton.jit
def _add_rms_norm(h, d, weight, total, normed, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, BLOCK)
    ok = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(h + at, mask=ok, other=0).to(tl.float32)
    if ADD:
        x = (x + tl.load(d + at, mask=ok, other=0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, x, mask=ok)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    y = x * scale * tl.load(weight + columns, mask=ok, other=0).to(tl.float32)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=ok)


@triton.jit
def _rms_norm_backward(h, weight, grad, residual_grad, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, BLOCK)
    ok = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(h + at, mask=ok, other=0).to(tl.float32)
    w = tl.load(weight + columns, mask=ok, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    unit = x * scale
    g = tl.load(grad + at, mask=ok, other=0).to(tl.float32) * w
    dx = scale * (g - unit * (tl.sum(g * unit) / width))
    dx += tl.load(residual_grad + at, mask=ok, other=0).to(tl.float32)
    tl.store(residual_grad + at, dx.to(residual_grad.dtype.element_ty), mask=ok)
    tl.store(grad + at, (unit * w).to(grad.dtype.element_ty), mask=ok)


@triton.jit
def _norm_weight(q_weight, k_weight, heads, head_ok, columns, column_ok, query_heads):  # type: ignore[no-untyped-def]
    ok = head_ok[:, None] & column_ok[None, :]
    is_query = (heads < query_heads)[:, None]
    q = tl.load(q_weight + columns[None, :], mask=ok & is_query, other=0).to(tl.float32)
    k = tl.load(k_weight + columns[None, :], mask=ok & (heads >= query_heads)[:, None], other=0).to(tl.float32)
    return q + k


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    source, out, cos, sin, q_weight, k_weight, source_stride, out_stride, query_heads, heads_total, half, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    head_ok, column_ok = heads < heads_total, columns < half
    ok = head_ok[:, None] & column_ok[None, :]
    inside = heads[:, None] * 2 * half + columns[None, :]
    x = tl.load(source + token * source_stride + inside, mask=ok, other=0).to(tl.float32)
    y = tl.load(source + token * source_stride + inside + half, mask=ok, other=0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * half) + eps)[:, None]
        x = x * scale * _norm_weight(q_weight, k_weight, heads, head_ok, columns, column_ok, query_heads)
        y = y * scale * _norm_weight(q_weight + half, k_weight + half, heads, head_ok, columns, column_ok, query_heads)
    angle = token * 2 * half + columns
    c = tl.load(cos + angle, mask=column_ok, other=0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column_ok, other=0).to(tl.float32)[None, :]
    tl.store(out + token * out_stride + inside, (x * c - y * s).to(out.dtype.element_ty), mask=ok)
    tl.store(out + token * out_stride + inside + half, (y * c + x * s).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _rotate_backward(  # type: ignore[no-untyped-def]
    dq, dk, dv, raw, out, cos, sin, q_weight, k_weight, stride, query_heads, kv_heads, half, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    column_ok = columns < half
    rotated = query_heads + kv_heads
    head_ok = heads < rotated + kv_heads
    is_q = (heads < query_heads)[:, None] & column_ok[None, :]
    is_k = ((heads >= query_heads) & (heads < rotated))[:, None] & column_ok[None, :]
    is_v = ((heads >= rotated) & head_ok)[:, None] & column_ok[None, :]
    at_q = dq + (token * query_heads + heads)[:, None] * 2 * half + columns[None, :]
    at_k = dk + (token * kv_heads + heads - query_heads)[:, None] * 2 * half + columns[None, :]
    at_v = dv + (token * kv_heads + heads - rotated)[:, None] * 2 * half + columns[None, :]
    x = tl.load(at_q, mask=is_q, other=0).to(tl.float32) + tl.load(at_k, mask=is_k, other=0).to(tl.float32)
    y = tl.load(at_q + half, mask=is_q, other=0).to(tl.float32)
    y += tl.load(at_k + half, mask=is_k, other=0).to(tl.float32)
    angle = token * 2 * half + columns
    c = tl.load(cos + angle, mask=column_ok, other=0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column_ok, other=0).to(tl.float32)[None, :]
    gx, gy = x * c + y * s, y * c - x * s
    inside = token * stride + heads[:, None] * 2 * half + columns[None, :]
    if NORM:
        turned = is_q | is_k
        rx = tl.load(raw + inside, mask=turned, other=0).to(tl.float32)
        ry = tl.load(raw + inside + half, mask=turned, other=0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(rx * rx, 1) + tl.sum(ry * ry, 1)) / (2 * half) + eps)[:, None]
        gx *= _norm_weight(q_weight, k_weight, heads, head_ok, columns, column_ok, query_heads)
        gy *= _norm_weight(q_weight + half, k_weight + half, heads, head_ok, columns, column_ok, query_heads)
        rx, ry = rx * scale, ry * scale
        mean = ((tl.sum(gx * rx, 1) + tl.sum(gy * ry, 1)) / (2 * half))[:, None]
        gx, gy = scale * (gx - rx * mean), scale * (gy - ry * mean)
    gx += tl.load(at_v, mask=is_v, other=0).to(tl.float32)
    gy += tl.load(at_v + half, mask=is_v, other=0).to(tl.float32)
    ok = head_ok[:, None] & column_ok[None, :]
    tl.store(out + inside, gx.to(out.dtype.element_ty), mask=ok)
    tl.store(out + inside + half, gy.to(out.dtype.element_ty), mask=ok)


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def rms_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of `h` `[tokens, width]` (arXiv:1910.07467)."""
    normed, width = torch.empty_like(h), h.shape[1]
    block = triton.next_power_of_2(width)
    _add_rms_norm[(len(h),)](h, h, weight, h, normed, width, eps, False, block, num_warps=_warps(width))
    return normed


def add_rms_norm(
    h: torch.Tensor, d: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h + d` and its RMSNorm; the sum takes the place of `d`."""
    normed, width = torch.empty_like(h), h.shape[1]
    block = triton.next_power_of_2(width)
    _add_rms_norm[(len(h),)](h, d, weight, d, normed, width, eps, True, block, num_warps=_warps(width))
    return d, normed


def rms_norm_backward(
    h: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor, residual_grad: torch.Tensor
) -> None:
    """Add the gradient of RMSNorm's input to `residual_grad`; `grad` is replaced by the norm's output."""
    width = h.shape[1]
    block = triton.next_power_of_2(width)
    _rms_norm_backward[(len(h),)](h, weight, grad, residual_grad, width, eps, block, num_warps=_warps(width))


def rotate(
    qkv: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    query_heads: int,
    kv_heads: int,
) -> None:
    """Head norms, where a family has them, and rotary embedding of queries and keys, from `qkv` into `out`."""
    half, heads = cos.shape[1] // 2, query_heads + kv_heads
    q_weight, k_weight = norms or (cos, cos)
    _rotate[(len(qkv), triton.cdiv(heads, HEADS))](
        qkv, out, cos, sin, q_weight, k_weight, qkv.stride(0), out.stride(0), query_heads, heads, half, eps,
        norms is not None, HEADS, triton.next_power_of_2(half), num_warps=2,
    )  # fmt: skip


def rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    raw: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Gradient of `[tokens, queries | keys | values]` from those after rotation; `raw` is needed with norms."""
    dq, dk, dv = (g.contiguous() for g in grads)
    (tokens, query_heads, width), kv_heads = dq.shape, dk.shape[1]
    heads, half = query_heads + 2 * kv_heads, width // 2
    out = dq.new_empty(tokens, heads * width)
    q_weight, k_weight = norms or (cos, cos)
    _rotate_backward[(tokens, triton.cdiv(heads, HEADS))](
        dq, dk, dv, out if raw is None else raw, out, cos, sin, q_weight, k_weight, out.stride(0), query_heads,
        kv_heads, half, eps, norms is not None, HEADS, triton.next_power_of_2(half), num_warps=2,
    )  # fmt: skip
    return out
