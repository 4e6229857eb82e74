"""Causal attention inside each row of a pack, forward and backward without a recorded graph."""

from itertools import pairwise
from typing import NamedTuple

import torch

from qlora_core.training.engine import flash4
from qlora_core.training.engine.compiled import why_not
from qlora_core.training.engine.pack import Pack

aten = torch.ops.aten


class Attended(NamedTuple):
    """What attention made, and what its backward needs beside queries, keys and values."""

    out: torch.Tensor
    """`[tokens, query_heads, head_width]`"""
    log_sum: torch.Tensor
    """Logarithm of the softmax denominators, fp32."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Attended:
    """Attention (arXiv:2307.08691) of `[tokens, heads, head_width]`; keys and values may have fewer heads."""
    if not q.is_cuda:
        return _attend_row_by_row(q, k, v, pack)
    if _by_flash4(q, k):
        return Attended(*flash4.forward(q, k, v, pack))
    if _suits_cudnn(q, pack):
        made = aten._scaled_dot_product_cudnn_attention(
            _batched(q, pack), _batched(k, pack), _batched(v, pack), None, True, 0.0, True, False
        )
        return Attended(_flat(made[0]), made[1])
    out, log_sum, *_ = aten._flash_attention_forward(
        q, k, v, pack.starts, pack.starts, pack.longest, pack.longest, 0.0, True, False
    )
    return Attended(out, log_sum)


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, made: Attended, pack: Pack
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values, in their shapes."""
    if not q.is_cuda:
        return _backward_row_by_row(grad, q, k, v, made, pack)
    if _by_flash4(q, k):
        return flash4.backward(grad, q, k, v, made.out, made.log_sum, pack)
    if _suits_cudnn(q, pack):
        none, parts = torch.zeros((), dtype=torch.int64, device=q.device), (q, k, v, made.out)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            _batched(grad, pack), *(_batched(part, pack) for part in parts), made.log_sum, none, none, None, None, None,
            pack.longest, pack.longest, 0.0, True,
        )  # fmt: skip
        return _flat(grads[0]), _flat(grads[1]), _flat(grads[2])
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        grad, q, k, v, made.out, made.log_sum, pack.starts, pack.starts, pack.longest, pack.longest,
        0.0, True, no_dropout, no_dropout,
    )  # fmt: skip
    return dq, dk, dv


def _by_flash4(q: torch.Tensor, k: torch.Tensor) -> bool:
    return why_not("flash4", *flash4.form(q.shape[1], k.shape[1], q.shape[2], q.dtype)) is None


def _suits_cudnn(q: torch.Tensor, pack: Pack) -> bool:
    """On Hopper and later cuDNN takes 0.6 of the time of FlashAttention 2, but only rows of one length."""
    return pack.even and q.shape[2] <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _batched(x: torch.Tensor, pack: Pack) -> torch.Tensor:
    """`[rows, heads, longest, head_width]`"""
    batched: torch.Tensor = x.unflatten(0, (-1, pack.longest))
    return batched.transpose(1, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, head_width]`"""
    return x.transpose(1, 2).flatten(0, 1)


def _rows(pack: Pack) -> list[slice]:
    starts = pack.starts.tolist()
    return [slice(a, b) for a, b in pairwise(starts) if b > a]


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[tokens, heads, head_width]` as a view `[kv_heads, heads / kv_heads, tokens, head_width]`."""
    grouped: torch.Tensor = x.unflatten(1, (kv_heads, -1))
    return grouped.permute(1, 2, 0, 3)


def _for_each_query(x: torch.Tensor, group: int) -> torch.Tensor:
    """Keys or values in the same form, each standing for all query heads that read it, without copies."""
    return _grouped(x, x.shape[1]).expand(-1, group, -1, -1)


def _attend_row_by_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Attended:
    out, log_sum = torch.empty(q.shape, dtype=q.dtype), q.new_empty(q.shape[:2], dtype=torch.float32)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    for row in _rows(pack):
        parts = _grouped(q[row], kv_heads), _for_each_query(k[row], group), _for_each_query(v[row], group)
        made, sums = aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, True)
        _grouped(out[row], kv_heads).copy_(made)
        log_sum[row] = sums.flatten(0, 1).t()
    return Attended(out, log_sum)


def _backward_row_by_row(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, made: Attended, pack: Pack
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    for row in _rows(pack):
        parts = _grouped(q[row], kv_heads), _for_each_query(k[row], group), _for_each_query(v[row], group)
        sums = made.log_sum[row].t().unflatten(0, (kv_heads, group)).contiguous()
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _grouped(grad[row], kv_heads), *parts, _grouped(made.out[row], kv_heads), sums, 0.0, True
        )
        _grouped(dq[row], kv_heads).copy_(grads[0])
        for whole, part in ((dk, grads[1]), (dv, grads[2])):
            torch.sum(part, 1, out=whole[row].transpose(0, 1))
    return dq, dk, dv
