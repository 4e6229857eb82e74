"""What stands between the matrix products, on whatever device: Triton on CUDA, torch elsewhere.

All tensors are flat over tokens: `[tokens, width]`. What is replaced in place is said.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch.nn import functional

from qlora_core.training.engine.operands import Behind, Lift, Masks
from qlora_core.training.pass_memory import LARGEST_FUSED_RANK

Norms = tuple[torch.Tensor, torch.Tensor]


def _kernels() -> ModuleType:
    from qlora_core.training.engine.kernels import elementwise

    return elementwise


def rms_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (arXiv:1910.07467)."""
    if h.is_cuda:
        return _kernels().rms_norm(h, weight, eps)  # type: ignore[no-any-return]
    return functional.rms_norm(h, weight.shape, weight, eps)


def add_rms_norm(
    h: torch.Tensor, d: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h + d`, in the place of `d`, and its RMSNorm."""
    if h.is_cuda:
        return _kernels().add_rms_norm(h, d, weight, eps)  # type: ignore[no-any-return]
    d += h
    return d, rms_norm(d, weight, eps)


def rms_norm_backward(
    h: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor, residual_grad: torch.Tensor
) -> None:
    """Add the gradient of RMSNorm's input to `residual_grad`; `grad` is replaced by the norm's output."""
    if h.is_cuda:
        _kernels().rms_norm_backward(h, weight, eps, grad, residual_grad)
        return
    scale = torch.rsqrt(torch.linalg.vecdot(h, h).div_(h.shape[-1]).add_(eps))[:, None]
    unit = h * scale
    grad *= weight
    mean = torch.linalg.vecdot(grad, unit)[:, None] / h.shape[-1]
    residual_grad.addcmul_(grad.addcmul_(unit, mean, value=-1), scale)
    torch.mul(unit, weight, out=grad)


def swiglu(
    gate_up: torch.Tensor, a: torch.Tensor | None, masks: Masks | None, lift: Lift | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`silu(gate) * up` (arXiv:2002.05202), and the first product of the adapter that reads it.

    Args:
        gate_up: `[tokens, gate | up]`
        a: the first matrix of that adapter, `[rank, width]`.
        masks: of what that adapter reads.
        lift: is added to gate and up first; only on CUDA, up to the largest fused rank.

    Returns:
        `[tokens, width]`, and `[tokens, rank]` with an adapter.
    """
    if gate_up.is_cuda:
        from qlora_core.training.engine.kernels import gated

        if a is not None and len(a) <= LARGEST_FUSED_RANK:
            return gated.swiglu_low(gate_up, a, masks, lift)
        inner = gated.swiglu(gate_up)
    else:
        gate, up = gate_up.chunk(2, dim=1)
        inner = functional.silu(gate).mul_(up)
    if a is None:
        return inner, None
    return inner, torch.mm(inner, a.t()) if masks is None else dropped_low(inner, a, masks)


def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor, behind: Behind | None, lift: Lift | None) -> None:
    """Replace `gate_up` by its gradient.

    Args:
        grad: of the activation; may be overwritten.
        gate_up: as in `swiglu`.
        behind: the adapter that reads the activation.
        lift: as in `swiglu`.
    """
    if grad.is_cuda:
        from qlora_core.training.engine.kernels import gated

        if behind is not None and behind.low_grad.shape[1] > LARGEST_FUSED_RANK:
            low_backward(behind, gated.swiglu(gate_up), grad)
            behind = None
        gated.swiglu_backward(grad, gate_up, behind, lift)
        return
    gate, up = gate_up.chunk(2, dim=1)
    silu = functional.silu(gate)
    if behind is not None:
        low_backward(behind, silu * up, grad)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate)
    torch.mul(grad, silu, out=up)


def rotate(
    qkv: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: Norms | None,
    eps: float,
    query_heads: int,
    kv_heads: int,
) -> None:
    """Head norms, where a family has them, and rotary embedding (arXiv:2104.09864) of queries and keys.

    Args:
        qkv: `[tokens, queries | keys | values]`.
        out: gets queries and keys in the same columns; may be `qkv` itself.
        cos: `[tokens, head_width]`.
        sin: `[tokens, head_width]`.
        norms: weights of the query and the key norm.
        eps: of these norms.
        query_heads: heads of queries.
        kv_heads: heads of keys.
    """
    if qkv.is_cuda:
        _kernels().rotate(qkv, out, cos, sin, norms, eps, query_heads, kv_heads)
        return
    width = cos.shape[1]
    at = 0
    for heads, norm in zip((query_heads, kv_heads), norms or (None, None), strict=True):
        x = qkv[:, at : at + heads * width].unflatten(1, (heads, width))
        if norm is not None:
            x = rms_norm(x, norm, eps)
        out[:, at : at + heads * width] = _turned(x, cos, sin).flatten(1)
        at += heads * width


def rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    raw: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: Norms | None,
    eps: float,
) -> torch.Tensor:
    """Gradient of `[tokens, queries | keys | values]` from those of what attention read; `raw` is needed with norms."""
    if cos.is_cuda:
        return _kernels().rotate_backward(grads, raw, cos, sin, norms, eps)  # type: ignore[no-any-return]
    parts, at = [], 0
    for grad, norm in zip(grads[:2], norms or (None, None), strict=True):
        turned = _turned(grad, cos, -sin)
        if norm is not None and raw is not None:
            x = raw[:, at : at + grad[0].numel()].view_as(grad)
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            unit, turned = x * scale, turned * norm
            turned = scale * (turned - unit * (turned * unit).mean(-1, keepdim=True))
        parts.append(turned.flatten(1))
        at += grad[0].numel()
    return torch.cat([*parts, grads[2].flatten(1)], dim=1)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses `[rows]` in fp32; `logits` become the gradient of their sum. Negative targets carry neither."""
    if logits.is_cuda:
        from qlora_core.training.engine.kernels.cross_entropy import cross_entropy as kernel

        return kernel(logits, targets)
    counts = targets >= 0
    picked = targets.clamp(min=0)[:, None]
    log_shares = torch.log_softmax(logits, -1)
    losses = -log_shares.gather(1, picked).squeeze(1) * counts
    torch.exp(log_shares, out=logits)
    logits.scatter_add_(1, picked, logits.new_full(picked.shape, -1.0))
    logits.mul_(counts[:, None])
    return losses


def dropout(x: torch.Tensor, masks: Masks, add_to: torch.Tensor | None) -> torch.Tensor:
    """`x`, of any shape, dropped out by the first of the masks; added to `add_to` in place, where that is given."""
    if x.is_cuda:
        from qlora_core.training.engine.kernels import dropped

        return dropped.dropout(x, masks, add_to)
    generator = torch.Generator().manual_seed(int(masks.seed) + masks.number)
    kept = torch.empty_like(x).bernoulli_(1 - masks.rate, generator=generator)
    made = x * kept.div_(1 - masks.rate)
    return made if add_to is None else add_to.add_(made)


def dropped_low(x: torch.Tensor, a: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Adapters' first products, `dropout(x) @ a.T`, each with a mask of its own.

    Args:
        x: `[tokens, inputs]`
        a: their first matrices, one above the other, `[count * rank, inputs]`.
        masks: as many as there are adapters.

    Returns:
        `[tokens, count * rank]`
    """
    if x.is_cuda:
        from qlora_core.training.engine.kernels import dropped

        return dropped.dropped_low(x, a, masks)
    parts = [
        torch.mm(dropout(x, mask, None), part.t())
        for mask, part in zip(masks.each(), a.chunk(masks.count), strict=True)
    ]
    return torch.cat(parts, dim=1)


def low_backward(behind: Behind, x: torch.Tensor, input_grad: torch.Tensor | None) -> None:
    """Add to the gradients of first matrices, and, where `behind` has these and there is one, to that of their input.

    Args:
        behind: the adapters.
        x: what they read, `[tokens, inputs]`.
        input_grad: like `x`.
    """
    low_grad, a, grad_a, masks = behind
    if masks is None:
        add_product(grad_a, low_grad.t(), x)
        if a is not None and input_grad is not None:
            input_grad.addmm_(low_grad, a)
        return
    if x.is_cuda:
        from qlora_core.training.engine.kernels import dropped

        dropped.low_backward(behind, masks, x, input_grad)
        return
    lows = low_grad.chunk(masks.count, dim=1)
    for mask, low, grad in zip(masks.each(), lows, grad_a.chunk(masks.count), strict=True):
        add_product(grad, low.t(), dropout(x, mask, None))
    if a is not None and input_grad is not None:
        for mask, low, first in zip(masks.each(), lows, a.chunk(masks.count), strict=True):
            dropout(torch.mm(low, first), mask, input_grad)


def both_sides(
    x: torch.Tensor,
    m: torch.Tensor,
    u: torch.Tensor,
    low: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    parts: Sequence[slice] = (slice(None),),
) -> None:
    """`low = x @ m` and `grad += scale * x.T @ u`, for each part of the columns of `x`.

    Args:
        x: `[tokens, width]`
        m: `[widths, rank]`, of one part above that of the next.
        u: `[tokens, parts * rank]`, of one part beside that of the next.
        low: like `u`; is written.
        grad: like `m`, fp32; is added to.
        scale: of what is added.
        parts: the columns of each; up to three, one after the other, or two that take turns.
    """
    if x.is_cuda and m.shape[1] <= LARGEST_FUSED_RANK:
        from qlora_core.training.engine.kernels.products import both_sides as kernel

        kernel(x, m, u, low, grad, scale, parts)
        return
    columns = [x[:, part] for part in parts]
    widths = [part.shape[1] for part in columns]
    each = m.split(widths), u.chunk(len(parts), 1), low.chunk(len(parts), 1), grad.split(widths)
    for x_part, m_part, u_part, low_part, grad_part in zip(columns, *each, strict=True):
        low_part.copy_(torch.mm(x_part, m_part))
        add_product(grad_part, x_part.t(), u_part, scale)


def add_product(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """`grad += scale * left @ right`, accumulated in fp32."""
    if left.dtype == grad.dtype and len(grad) > grad.shape[1]:
        grad.add_(torch.mm(right.t(), left.t()).t(), alpha=scale)  # a CPU is slower at tall products than at wide ones
    elif left.dtype == grad.dtype:
        grad.addmm_(left, right, alpha=scale)
    elif grad.is_contiguous():
        torch.addmm(grad, left, right, out_dtype=torch.float32, alpha=scale, out=grad)
    else:
        grad.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=scale)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, width]` by the angles of `[tokens, width]`; their two halves are the same."""
    turned, half = x * cos[:, None], x.shape[-1] // 2
    turned[..., :half].addcmul_(x[..., half:], sin[:, None, :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[:, None, half:])
    return turned
