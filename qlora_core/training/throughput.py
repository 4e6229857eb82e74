"""How much arithmetic a step is, and what share of the device's practical peak it reached (MFU)."""

import resource
import time
from collections.abc import Sequence

import torch

from qlora_core.artifacts import Architecture

GIB, KIB = 2**30, 2**10
SIDE = {"cuda": 8192, "cpu": 1024}
REPEATS = 4


def practical_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large square matrix product here; the best of a few."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))  # ones would run faster than data
    out = a @ b
    fastest = float("inf")
    for _ in range(REPEATS):
        _finish(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        _finish(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


def step_operations(model: Architecture, adapter_parameters: int, lengths: Sequence[int], trained_tokens: int) -> float:
    """Floating-point operations that a step needs, recomputation not counted.

    Frozen weights cost 2 operations a token forward and 2 backward, trained ones 2 more; the head only works where a
    token is trained; attention is causal, and its backward pass is twice its forward pass.
    """
    head = model.vocab * model.hidden
    blocks = max(0, model.parameters - head * (1 if model.tied_embeddings else 2))
    tokens = sum(lengths)
    attention = 6 * model.layers * model.heads * model.head_width * sum(length**2 for length in lengths)
    return 4 * blocks * tokens + 6 * adapter_parameters * tokens + 4 * head * trained_tokens + attention


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GIB


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
