"""Cross entropy whose gradient takes the place of the logits."""

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def _cross_entropy(logits, targets, losses, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * vocabulary
    target = tl.load(targets + row)
    picked = tl.load(at + tl.maximum(target, 0)).to(tl.float32)  # before any warp overwrites it
    largest, total = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(at + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new))
        largest = new
    log_sum = largest + tl.log(total)
    counts = target >= 0
    tl.store(losses + row, tl.where(counts, log_sum - picked, 0.0))
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        ok = columns < vocabulary
        x = tl.load(at + columns, mask=ok, other=0).to(tl.float32)
        grad = tl.exp(x - log_sum) - tl.where(columns == target, 1.0, 0.0)
        tl.store(at + columns, tl.where(counts, grad, 0.0).to(logits.dtype.element_ty), mask=ok)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses `[rows]` in fp32; `logits` `[rows, vocabulary]` become the gradient of their sum. Negative targets: 0."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](logits, targets, losses, logits.shape[1], BLOCK, num_warps=16)
    return losses
