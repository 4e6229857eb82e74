"""Products with wide outputs, by QuACK (package `quack-kernels`) on Hopper and by cuBLAS elsewhere.

A GPU that trains runs at its power limit, where a kernel is as fast as it is frugal: for wide outputs QuACK's takes
0.93 to 0.97 of the time of cuBLAS's, with the same bits. For outputs no wider than inputs there is nothing to gain.
"""

from functools import cache
from typing import Any

import torch

from qlora_core.training.engine.compiled import keep_what_is_compiled, why_not

WIDE = 2
"""Outputs an input, from which a product is wide."""
ENOUGH_TOKENS = 1024
PROBED = 512


def form(dtype: torch.dtype) -> str:
    """What its kernels are compiled for."""
    return str(dtype).removeprefix("torch.")


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight`, of `[tokens, inputs]` and `[inputs, outputs]`."""
    (tokens, inputs), outputs = x.shape, weight.shape[1]
    if x.is_cuda and tokens >= ENOUGH_TOKENS and outputs >= WIDE * inputs and why_not("quack", form(x.dtype)) is None:
        return _by_quack(x, weight)
    return torch.mm(x, weight)


def probe(dtype: str) -> None:
    """Compile both forms, the second matrix row by row and column by column."""
    x, weight = (torch.zeros(PROBED, PROBED, dtype=getattr(torch, dtype), device="cuda") for _ in range(2))
    _by_quack(x, weight)
    _by_quack(x, weight.t())


def _by_quack(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _gemm()(x, weight, tuned=False)  # its own choice was as fast as any that a search found
    return product


@cache
def _gemm() -> Any:
    keep_what_is_compiled()
    from quack.gemm_interface import gemm

    return gemm
