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
        self._parameters, self._values = parameters, []
        views, at = [], 0
        for parameter in parameters:
            span, shape = slice(at, at + parameter.numel()), parameter.shape
            self.values[span].view(shape).copy_(parameter.data)
            parameter.data, parameter.grad = self.values[span].view(shape), self.grads[span].view(shape)
            self._values.append(parameter.data)
            views.append((self._compute[span].view(shape), self.grads[span].view(shape)))
            at += parameter.numel()
        self.pairs = {
            id(layer): self._pair(layer, a, b, number)
            for number, (layer, a, b) in enumerate(zip(layers, views[: len(layers)], views[len(layers) :], strict=True))
        }
        self.refresh()

    def refresh(self) -> None:
        """Bring the copy to compute with up to date; after every change of the parameters.

        Who divides optimizer state among processes moves parameters into memory of its own; they are copied from there.
        """
        if self._parameters[0].data_ptr() != self.values.data_ptr():
            torch._foreach_copy_(self._values, [parameter.detach() for parameter in self._parameters])
        self._compute[: self._border].copy_(self.values[: self._border])
        torch.mul(self.values[self._border :], self.scale, out=self._compute[self._border :])

    def _pair(
        self, layer: LoraLayer, a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], number: int
    ) -> Pair:
        drop = layer.lora_dropout[NAME]
        rate = drop.p if isinstance(drop, torch.nn.Dropout) else 0.0
        return Pair(a[0], b[0], a[1], b[1], self.scale, rate, number)
