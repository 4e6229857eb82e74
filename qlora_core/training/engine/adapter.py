"""All LoRA matrices of a model in three flat tensors: what is trained, its gradient, and a copy to compute with.

PEFT's own parameters become views of the first two, so that optimizers, checkpoints and PEFT's files see nothing new,
while clipping, zeroing and exchanging gradients between processes are one operation each.
"""

from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer

NAME = "default"


class Pair(NamedTuple):
    """The matrices of one adapted linear; `b` includes LoRA's scale (alpha / rank)."""

    a: torch.Tensor
    """`[rank, inputs]`, compute dtype."""
    b: torch.Tensor
    """`[outputs, rank]`, compute dtype."""
    grad_a: torch.Tensor
    """Like `a`, fp32."""
    grad_b: torch.Tensor
    """Like `b`, fp32, of the matrix without the scale."""
    scale: float
    dropout: float
    number: int
    """Which of a step's dropout masks is its own."""


class FlatAdapter:
    """The adapter of a model, laid out flat."""

    def __init__(self, layers: list[LoraLayer], dtype: torch.dtype) -> None:
        first = [layer.lora_A[NAME].weight for layer in layers]
        second = [layer.lora_B[NAME].weight for layer in layers]
        parameters = [*first, *second]
        device = parameters[0].device
        self.scale: float = layers[0].scaling[NAME]
        self._border = sum(p.numel() for p in first)
        size = self._border + sum(p.numel() for p in second)
        self.values = torch.empty(size, device=device, dtype=torch.float32)
        self.grads = torch.zeros(size, device=device, dtype=torch.float32)
        self._compute = torch.empty(size, device=device, dtype=dtype)
        self._parameters = parameters
        self._flat: list[torch.nn.Parameter] = []
        views, at = [], 0
        for parameter in parameters:
            span, shape = slice(at, at + parameter.numel()), parameter.shape
            self.values[span].view(shape).copy_(parameter.data)
            parameter.data, parameter.grad = self.values[span].view(shape), self.grads[span].view(shape)
            views.append((self._compute[span].view(shape), self.grads[span].view(shape)))
            at += parameter.numel()
        self.pairs = {
            id(layer): self._pair(layer, a, b, number)
            for number, (layer, a, b) in enumerate(zip(layers, views[: len(layers)], views[len(layers) :], strict=True))
        }
        self.refresh()

    @property
    def _parts(self) -> tuple[slice, slice]:
        """Where the first and where the second matrices lie."""
        return slice(0, self._border), slice(self._border, None)

    def flat_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All first and all second matrices as one parameter each, which from now on are trained in place of the many.

        For who hooks into every single parameter: hundreds of hooks cost more than what they do.
        """
        self._flat = [torch.nn.Parameter(self.values[part]) for part in self._parts]
        for parameter, part in zip(self._flat, self._parts, strict=True):
            parameter.grad = self.grads[part]
        for parameter in self._parameters:
            parameter.requires_grad_(False).grad = None
        return dict(zip(("adapter.lora_A.all", "adapter.lora_B.all"), self._flat, strict=True))

    def refresh(self) -> None:
        """Bring the copy to compute with up to date; after every change of the parameters.

        Who divides optimizer state among processes moves flat parameters into memory of its own; they are copied from
        there.
        """
        if self._flat and self._flat[0].data_ptr() != self.values.data_ptr():
            for parameter, part in zip(self._flat, self._parts, strict=True):
                self.values[part].copy_(parameter.detach())
        first, second = self._parts
        self._compute[first].copy_(self.values[first])
        torch.mul(self.values[second], self.scale, out=self._compute[second])

    def _pair(
        self, layer: LoraLayer, a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], number: int
    ) -> Pair:
        drop = layer.lora_dropout[NAME]
        rate = drop.p if isinstance(drop, torch.nn.Dropout) else 0.0
        return Pair(a[0], b[0], a[1], b[1], self.scale, rate, number)
