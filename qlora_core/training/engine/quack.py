"""Products with wide outputs, by QuACK (package `quack-kernels`) on Hopper and by cuBLAS elsewhere.

A GPU that trains runs at its power limit, where a kernel is as fast as it is frugal: for wide outputs QuACK's takes
0.93 to 0.97 of the time of cuBLAS's, with the same bits. For outputs no wider than inputs there is nothing to gain.

The gated activation needs no pass over memory of its own when it is computed where a product's tiles are written,
forward and backward. The columns of gate and up are interleaved then, so that both are in one tile.
"""

from functools import cache
from types import ModuleType

import torch

from qlora_core.training.engine.compiled import keep_what_is_compiled, why_not

WIDE = 2
"""Outputs an input, from which a product is wide."""
ENOUGH_TOKENS = 1024
ALIGNED = 8
"""16-bit values, 16 bytes: the tensor memory accelerator copies rows that are whole multiples of them."""
PROBED = 512


def form(dtype: torch.dtype) -> str:
    """What its kernels are compiled for."""
    return str(dtype).removeprefix("torch.")


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight`, of `[tokens, inputs]` and `[inputs, outputs]`."""
    (tokens, inputs), outputs = x.shape, weight.shape[1]
    wide = tokens >= ENOUGH_TOKENS and outputs >= WIDE * inputs and not inputs % ALIGNED and not outputs % ALIGNED
    if x.is_cuda and wide and why_not("quack", form(x.dtype)) is None:
        return _by_quack(x, weight)
    return torch.mm(x, weight)


def can_gate(like: torch.Tensor, inputs: int, width: int) -> bool:
    """Whether `gated` and `gated_backward` can be used on the device and with the dtype of a tensor."""
    return like.is_cuda and not inputs % ALIGNED and not width % ALIGNED and why_not("quack", form(like.dtype)) is None


def gated(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ weight`, and `silu(gate) * up` (arXiv:2002.05202) of it.

    Args:
        x: `[tokens, inputs]`
        weight: `[inputs, 2 * width]`, columns of gate and up interleaved.

    Returns:
        `[tokens, 2 * width]`, interleaved, and `[tokens, width]`.
    """
    made: tuple[torch.Tensor, torch.Tensor] = _quack().gemm_gated(x, weight, activation="swiglu", tuned=False)
    return made


def gated_backward(grad: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The backward of the activation, of the gradient `grad @ weight` of what it made.

    Args:
        grad: `[tokens, outputs]`, of what the activation was multiplied to.
        weight: `[outputs, width]`
        gate_up: `[tokens, 2 * width]`, interleaved; becomes its own gradient.

    Returns:
        The activation, `[tokens, width]`.
    """
    _, inner = _quack().gemm_dgated(grad, weight, gate_up, activation="swiglu", dx_out=gate_up, tuned=False)
    made: torch.Tensor = inner
    return made


def probe(dtype: str) -> None:
    """Compile all forms, the second matrix row by row and column by column."""
    x, weight, gate_up = (
        torch.zeros(PROBED, columns, dtype=getattr(torch, dtype), device="cuda")
        for columns in (PROBED, PROBED, 2 * PROBED)
    )
    _by_quack(x, weight)
    _by_quack(x, weight.t())
    gated(x, gate_up.view(2 * PROBED, PROBED).t())
    gated_backward(x, weight, gate_up)


def _by_quack(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _quack().gemm(x, weight, tuned=False)  # no choice that a search found was faster
    return product


@cache
def _quack() -> ModuleType:
    keep_what_is_compiled()
    from quack import gemm_interface

    return gemm_interface  # type: ignore[no-any-return]
