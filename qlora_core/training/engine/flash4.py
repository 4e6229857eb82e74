"""Attention by FlashAttention 4 (package `flash-attn-4`), made for Hopper and for rows of any lengths."""

from functools import cache
from typing import Any

import torch

from qlora_core.training.engine.compiled import keep_what_is_compiled
from qlora_core.training.engine.pack import Pack

PROBED_TOKENS = 256


def form(query_heads: int, kv_heads: int, head_width: int, dtype: torch.dtype) -> tuple[str, ...]:
    """What its kernels are compiled for."""
    return str(query_heads), str(kv_heads), str(head_width), str(dtype).removeprefix("torch.")


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logarithm of the softmax denominators, of `[tokens, heads, head_width]`."""
    parts = (_shaped(part, pack) for part in (q, k, v))
    out, log_sum, *_ = _interface()._flash_attn_fwd(*parts, **_bounds(pack), causal=True, return_lse=True)
    return out.view_as(q), log_sum


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    pack: Pack,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values, in their shapes."""
    parts = (_shaped(part, pack) for part in (q, k, v, out, grad))
    dq, dk, dv, *_ = _interface()._flash_attn_bwd(*parts, log_sum, **_bounds(pack), causal=True)
    return dq.view_as(q), dk.view_as(k), dv.view_as(v)


def probe(query_heads: str, kv_heads: str, head_width: str, dtype: str) -> None:
    """Compile what packs of equal and of different rows need."""
    for starts in ([0, PROBED_TOKENS], [0, 1, PROBED_TOKENS]):
        q, k, v = (
            torch.zeros(PROBED_TOKENS, int(heads), int(head_width), dtype=getattr(torch, dtype), device="cuda")
            for heads in (query_heads, kv_heads, kv_heads)
        )
        ids = torch.zeros(PROBED_TOKENS, dtype=torch.int64, device="cuda")
        pack = Pack(ids, ids, torch.tensor(starts, dtype=torch.int32, device="cuda"), ids, ids, PROBED_TOKENS)
        out, log_sum = forward(q, k, v, pack)
        backward(out, q, k, v, out, log_sum, pack)


@cache
def _interface() -> Any:
    """Its passes without autograd, which the package does not promise to keep: its version is pinned exactly."""
    keep_what_is_compiled()
    from flash_attn.cute import interface

    return interface


def _shaped(x: torch.Tensor, pack: Pack) -> torch.Tensor:
    """`[rows, longest, heads, head_width]` where all rows have one length, which is a little faster."""
    shaped: torch.Tensor = x.unflatten(0, (-1, pack.longest)) if pack.even else x
    return shaped


def _bounds(pack: Pack) -> dict[str, Any]:
    if pack.even:
        return {}
    starts, longest = pack.starts, pack.longest
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
