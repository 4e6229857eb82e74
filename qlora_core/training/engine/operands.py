"""What operations on adapters take together, on whatever device."""

from typing import NamedTuple

import torch


class Masks(NamedTuple):
    """Dropout masks with consecutive numbers; each depends on seed and number alone.

    A share `rate` of the values is zeroed and the rest scaled up.
    """

    seed: torch.Tensor
    """int64, one value, on the device of what is dropped, so that a CUDA graph can be replayed with another."""
    number: int
    """Of the first."""
    count: int  # type: ignore[assignment]  # a tuple's own is of no use here
    rate: float

    def each(self) -> list["Masks"]:
        """One by one."""
        return [Masks(self.seed, self.number + at, 1, self.rate) for at in range(self.count)]


class Lift(NamedTuple):
    """What adapters that stand apart add to gate and to up: of each, `low @ b.T`."""

    low: torch.Tensor
    """`[tokens, gate's rank | up's rank]`"""
    b: torch.Tensor
    """Gate's above up's, `[2 * width, rank]`."""


class Behind(NamedTuple):
    """What the backward of the first products of adapters that read one input needs, `dropout(x) @ a.T`."""

    low_grad: torch.Tensor
    """Of these products, `[tokens, count * rank]`."""
    a: torch.Tensor | None
    """`[count * rank, inputs]`; None when the gradient of `x` is not wanted, or has the adapters' part already."""
    grad_a: torch.Tensor
    """Like `a`, fp32; is added to."""
    masks: Masks | None
