"""Linears that read the same input, as one matrix product, with their adapters.

Without dropout the adapter is part of the weight: `W + s B A` is made while dequantizing, and neither direction needs
another pass over the wide outputs. With dropout the adapter reads an input of its own and stays apart: masks are made
inside the kernels that read the input, and the widest outputs get the adapter's part inside the one that reads them.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from qlora_core.errors import TrainingError
from qlora_core.training.engine.adapter import FlatAdapter, Pair
from qlora_core.training.engine.operands import Behind, Lift, Masks
from qlora_core.training.engine.ops import add_product, both_sides, dropped_low, low_backward
from qlora_core.training.engine.quack import Quack
from qlora_core.training.engine.weights import Weight, weight_of
from qlora_core.training.pass_memory import LARGEST_FUSED_RANK


class Part(NamedTuple):
    """One linear of a group: its weight, its columns of the output, its adapter."""

    weight: Weight
    columns: slice
    pair: Pair | None


class Group:
    """Linears that read the same input."""

    def __init__(
        self,
        parts: Sequence[Part],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        quack: Quack,
    ) -> None:
        self._parts, self._bias, self._dtype, self._device, self._quack = parts, bias, dtype, device, quack
        self.shape = (parts[-1].columns.stop, parts[0].weight.shape[1])
        self.apart = self._drops
        """Whether the adapter is computed beside the weight and not as part of it."""
        self._kept: torch.Tensor | None = None
        self.interleaved = False
        """Whether the outputs of two parts take turns in the columns, as `Quack.gated` reads them."""

    @property
    def bytes(self) -> int:
        """Of the dequantized weight."""
        size: int = self.shape[0] * self.shape[1] * self._dtype.itemsize
        return size

    @property
    def can_interleave(self) -> bool:
        """Whether all that reads and writes interleaved outputs can do so here."""
        adapted = len(self.pairs) == 2 and len(self.pairs[0].a) <= LARGEST_FUSED_RANK
        return not self.apart and self._bias is None and (adapted or not self.pairs)

    def interleave(self, wanted: bool) -> None:
        """Let the outputs of both parts take turns in the columns, or not; between passes only."""
        if wanted != self.interleaved:
            self.interleaved = wanted
            self.refresh()

    def keep(self) -> None:
        """Hold the dequantized weight from now on; `refresh` must follow every change of the adapter."""
        self._kept = torch.empty(self.shape, dtype=self._dtype, device=self._device)
        self._fill(self._kept)

    def keep_apart(self) -> None:
        """Hold the base's weight alone, and compute the adapter as products of its own."""
        self.apart = True
        self.keep()

    def refresh(self) -> None:
        """Make the held weight anew."""
        if self._kept is not None and not self.apart:
            self._fill(self._kept)

    def weight(self) -> torch.Tensor:
        """`[outputs, inputs]`, dequantized, with the adapter unless that stands apart."""
        if self._kept is not None:
            return self._kept
        out = torch.empty(self.shape, dtype=self._dtype, device=self._device)
        self._fill(out)
        return out

    def forward(self, x: torch.Tensor, seed: torch.Tensor | None, low: torch.Tensor | None = None) -> torch.Tensor:
        """`[tokens, inputs]` to `[tokens, outputs]`; `low` is what the first matrix of its adapter made of `x`."""
        y = self._product(x)
        if self.apart and self.pairs:
            lows = self._low(x, seed) if low is None else low
            for (part, pair), mine in zip(self._adapted(), lows.chunk(len(self.pairs), dim=1), strict=True):
                y[:, part.columns].addmm_(mine, pair.b.t())
        return y

    def forward_gated(self, x: torch.Tensor, seed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `forward`, of gate and up; what `lift` makes of the second is still to be added, if there is a second."""
        fused = self._device.type == "cuda" and len(self.pairs) == 2 and len(self.pairs[0].a) <= LARGEST_FUSED_RANK
        if not self.apart or not fused:
            return self.forward(x, seed), None
        return self._product(x), self._low(x, seed)

    def lift(self, low: torch.Tensor | None) -> Lift | None:
        """What `forward_gated` has left out, for the kernel of the activation."""
        return None if low is None else Lift(low, self._stacked("b"))

    def input_grad(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the input but for what `adapter_grads` adds."""
        return self._quack.product(grad, self.weight())

    @property
    def pairs(self) -> list[Pair]:
        """The adapters, in order."""
        return [part.pair for part in self._parts if part.pair is not None]

    def masks(self, seed: torch.Tensor | None) -> Masks | None:
        """Of what the adapters read; None without dropout."""
        if seed is None or not self._drops:
            return None
        return Masks(seed, self.pairs[0].number, len(self.pairs), self.pairs[0].dropout)

    def adapter_grads(
        self, grad: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, input_grad: torch.Tensor | None
    ) -> None:
        """Add the gradients of the adapters, and of the input through them when they stand apart.

        Args:
            grad: of the outputs.
            x: the input.
            seed: of the dropout masks; None for no dropout.
            input_grad: is added to; None when nobody needs it.
        """
        if not self.pairs:
            return
        low, scale = self._low(x, seed), self.pairs[0].scale
        low_grad = torch.empty_like(low)
        columns = [self._columns(number) for number, part in enumerate(self._parts) if part.pair is not None]
        both_sides(grad, self._stacked("b"), low, low_grad, self._stacked("grad_b"), scale, columns)
        a = self._stacked("a") if self.apart else None
        low_backward(Behind(low_grad, a, self._stacked("grad_a"), self.masks(seed)), x, input_grad)

    def adapter_grads_of_wide_input(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """As `adapter_grads`, of one linear whose adapter is part of its weight; reads `x` once and not twice."""
        for pair in self.pairs:
            low_grad = torch.mm(grad, pair.b)
            low = torch.empty_like(low_grad)
            both_sides(x, pair.a.t(), low_grad, low, pair.grad_a.t(), 1.0)
            add_product(pair.grad_b, grad.t(), low, pair.scale)

    @property
    def _drops(self) -> bool:
        return any(pair.dropout > 0 for pair in self.pairs)

    def _low(self, x: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        """What the first matrices of the adapters make of the input, `[tokens, count * rank]`."""
        masks, a = self.masks(seed), self._stacked("a")
        return torch.mm(x, a.t()) if masks is None else dropped_low(x, a, masks)

    def _stacked(self, name: Literal["a", "b", "grad_a", "grad_b"]) -> torch.Tensor:
        """Matrices of the adapters, one above the other: so they lie in memory."""
        each: list[torch.Tensor] = [getattr(pair, name) for pair in self.pairs]
        columns = each[0].shape[1]
        return each[0].as_strided((sum(map(len, each)), columns), (columns, 1))

    def _columns(self, number: int) -> slice:
        """Of a part, in the outputs."""
        return slice(number, None, 2) if self.interleaved else self._parts[number].columns

    def _adapted(self) -> list[tuple[Part, Pair]]:
        return [(part, part.pair) for part in self._parts if part.pair is not None]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._bias is None:
            return self._quack.product(x, self.weight().t())
        return functional.linear(x, self.weight(), self._bias)

    def _fill(self, out: torch.Tensor) -> None:
        for number, part in enumerate(self._parts):
            pair = None if self.apart else part.pair
            part.weight.fill(out[self._columns(number)], pair and pair.a, pair and pair.b)


def group_of(modules: Sequence[torch.nn.Module], adapter: FlatAdapter, dtype: torch.dtype, quack: Quack) -> Group:
    """A group from a model's modules, adapted by PEFT or not.

    Raises:
        TrainingError: a weight is in a form that is not known.
    """
    parts, biases, start = [], [], 0
    for module in modules:
        base = module.base_layer if isinstance(module, LoraLayer) else module
        weight = weight_of(base)
        if weight is None:
            raise TrainingError(
                f"the weight of a {type(base).__name__} is in a form that the fused engine cannot read; it reads full "
                "precision, NF4, FP4 and GPTQ in 4 or 8 bits as `load_base` leaves them: load the model with it"
            )
        outputs = weight.shape[0]
        parts.append(Part(weight, slice(start, start + outputs), adapter.pairs.get(id(module))))
        biases.append(getattr(base, "bias", None))
        start += outputs
    device = adapter.values.device
    return Group(parts, _joined(biases, parts, dtype, device), dtype, device, quack)


def _joined(
    biases: Sequence[torch.Tensor | None], parts: Sequence[Part], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    sizes = [part.columns.stop - part.columns.start for part in parts]
    zero = [torch.zeros(size) if bias is None else bias.detach() for bias, size in zip(biases, sizes, strict=True)]
    return torch.cat([part.to(device, dtype) for part in zero])
