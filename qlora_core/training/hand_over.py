"""Gradients that a module computed itself, handed to somebody who waits for autograd to deliver them."""

from collections.abc import Sequence
from typing import Any

import torch


class HandOver:
    """Takes `parameter.grad` over, where a module goes on adding to it, and leaves None in its place."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            parameter.grad = None

    def source(self) -> torch.Tensor:
        """A zero whose backward pass delivers what was added up since the last one."""
        source: torch.Tensor = _Delivery.apply(self._gradients, *self._parameters)
        return source


class _Delivery(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[Any, ...]:
        delivered = torch._foreach_mul(ctx.gradients, scale)
        torch._foreach_zero_(ctx.gradients)
        return None, *delivered
