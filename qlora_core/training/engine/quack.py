"""Wide products, the gated activation and the loss by QuACK (package `quack-kernels`) on Hopper, by others elsewhere.

A GPU that trains runs at its power limit, where a kernel is as fast as it is frugal: for wide outputs QuACK's takes
0.93 to 0.97 of the time of cuBLAS's, with the same bits. For other shapes some of its tilings are faster alone, by up
to a sixth for the gradient that the head sends back, but not in a training step, where 0.5 % would show; and with them
a 7B model's first step came after 16 s.

The gated activation needs no pass over memory of its own when it is computed where a product's tiles are written,
forward and backward. The columns of gate and up are interleaved then, so that both are in one tile. The loss reads
logits once and not twice, as a row is spread over several multiprocessors.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch

from qlora_core.training.engine import ops
from qlora_core.training.engine.compiled import keep_what_is_compiled, why_not
from qlora_core.training.engine.pack import IGNORED

WIDE = 2
"""Outputs an input, from which a product is wide."""
ENOUGH_TOKENS = 1024
FEW_INPUTS = 2048
"""Up to here, the backward of the activation takes longer to write a tile than to multiply it, and is faster with
smaller ones: 0.45 for 0.51 ms with the 1,536 inputs of a 1.5B model, 1.94 for 1.87 with the 3,584 of a 7B one."""
ALIGNED = 8
"""16-bit values, 16 bytes: the tensor memory accelerator copies rows that are whole multiples of them."""
PROBED = 512


def form(dtype: torch.dtype, hidden: int, vocabulary: int) -> tuple[str, ...]:
    """What its kernels are compiled for."""
    return str(dtype).removeprefix("torch."), str(hidden), str(vocabulary)


class Quack:
    """The kernels for one model; what they cannot do, or not yet, others do."""

    def __init__(self, dtype: torch.dtype, hidden: int, vocabulary: int) -> None:
        self._form = form(dtype, hidden, vocabulary)
        self._gated_backward_columns = 128 if hidden <= FEW_INPUTS else 192

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x @ weight`, of `[tokens, inputs]` and `[inputs, outputs]`."""
        (tokens, inputs), outputs = x.shape, weight.shape[1]
        wide = tokens >= ENOUGH_TOKENS and outputs >= WIDE * inputs and not inputs % ALIGNED and not outputs % ALIGNED
        return _product(x, weight) if wide and self._works_on(x) else torch.mm(x, weight)

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As `ops.cross_entropy`; targets that carry no loss are `pack.IGNORED`."""
        if not logits.shape[1] % ALIGNED and self._works_on(logits):
            return _cross_entropy(logits, targets)
        return ops.cross_entropy(logits, targets)

    def can_gate(self, like: torch.Tensor, inputs: int, width: int) -> bool:
        """Whether `gated` and `gated_backward` can be used on the device of a tensor."""
        return not inputs % ALIGNED and not width % ALIGNED and self._works_on(like)

    def gated(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x @ weight`, and `silu(gate) * up` (arXiv:2002.05202) of it.

        Args:
            x: `[tokens, inputs]`
            weight: `[inputs, 2 * width]`, columns of gate and up interleaved.

        Returns:
            `[tokens, 2 * width]`, interleaved, and `[tokens, width]`.
        """
        made: tuple[torch.Tensor, torch.Tensor] = _quack().gemm_gated(x, weight, activation="swiglu", tuned=False)
        return made

    def gated_backward(self, grad: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """The backward of the activation, of the gradient `grad @ weight` of what it made.

        Args:
            grad: `[tokens, outputs]`, of what the activation was multiplied to.
            weight: `[outputs, width]`
            gate_up: `[tokens, 2 * width]`, interleaved; becomes its own gradient.

        Returns:
            The activation, `[tokens, width]`.
        """
        config = _tiles(128, self._gated_backward_columns)
        _, inner = _quack().gemm_dgated(
            grad, weight, gate_up, activation="swiglu", dx_out=gate_up, config=config, dynamic_scheduler=False
        )
        made: torch.Tensor = inner
        return made

    def compile(self) -> None:
        """All forms of all kernels, on the current device."""
        dtype, vocabulary = getattr(torch, self._form[0]), int(self._form[2])
        x, weight, gate_up = (
            torch.zeros(PROBED, columns, dtype=dtype, device="cuda") for columns in (PROBED, PROBED, 2 * PROBED)
        )
        _product(x, weight)  # the second matrix row by row, and column by column
        _product(x, weight.t())
        self.gated(x, gate_up.view(2 * PROBED, PROBED).t())
        self.gated_backward(x, weight, gate_up)
        if not vocabulary % ALIGNED:
            logits = torch.zeros(1, vocabulary, dtype=dtype, device="cuda")
            _cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device="cuda"))

    def _works_on(self, x: torch.Tensor) -> bool:
        return x.is_cuda and why_not("quack", *self._form) is None


def probe(dtype: str, hidden: str, vocabulary: str) -> None:
    """Compile what a model needs."""
    Quack(getattr(torch, dtype), int(hidden), int(vocabulary)).compile()


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _quack().gemm(x, weight, tuned=False)
    return product


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from quack.cross_entropy import cross_entropy_fwd

    losses, _ = cross_entropy_fwd(logits, targets, ignore_index=IGNORED, return_dx=True, inplace_backward=True)
    made: torch.Tensor = losses
    return made


@cache
def _tiles(rows: int, columns: int) -> Any:
    """Two groups of warps take turns: one multiplies a tile while the other writes one."""
    from quack.gemm_config import GemmConfig

    return GemmConfig(tile_m=rows, tile_n=columns, pingpong=True, is_dynamic_persistent=False)


@cache
def _quack() -> ModuleType:
    keep_what_is_compiled()
    from quack import gemm_interface

    return gemm_interface  # type: ignore[no-any-return]
