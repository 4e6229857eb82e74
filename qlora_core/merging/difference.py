"""How far a block of a merged tensor is from the base's."""

from math import isfinite
from typing import NamedTuple

import numpy as np
import torch

from qlora_core.merging.blocks import Scratch

WORD_BYTES = 8


class Difference(NamedTuple):
    """Of one block, or summed over a tensor's; `largest` is NaN or infinite when a merged value is."""

    largest: float
    change_squared: float
    base_squared: float

    def plus(self, other: "Difference") -> "Difference":
        """Both together."""
        finite = isfinite(self.largest)
        return Difference(
            max(other.largest, self.largest) if finite else self.largest,
            self.change_squared + other.change_squared,
            self.base_squared + other.base_squared,
        )


def difference(before: torch.Tensor, after: torch.Tensor, scratch: Scratch, moved: bool) -> Difference:
    """From rows of the base to what stands in the merged file; of rows that did not move only whether they are finite.

    Args:
        before: rows of the base.
        after: the same rows of the merged model.
        scratch: this process's buffers.
        moved: whether the tensor was changed, and not only copied or cast.
    """
    if not moved:
        return Difference(0.0 if _finite(after) else float("nan"), 0.0, 0.0)
    base = scratch.cast("base", before, torch.float32).view(-1)
    change = scratch.cast("moved", after, torch.float32).view(-1).sub_(base)
    return Difference(_largest(change), float(change.dot(change)), float(base.dot(base)))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous tensors have the same bytes, NaNs included; in words where they divide into them."""
    raw, others = (values.view(-1).view(torch.uint8).numpy() for values in (one, other))
    words = raw.nbytes // WORD_BYTES * WORD_BYTES
    return (
        raw.nbytes == others.nbytes
        and np.array_equal(raw[:words].view(np.int64), others[:words].view(np.int64))
        and np.array_equal(raw[words:], others[words:])
    )


def _finite(values: torch.Tensor) -> bool:
    return not values.is_floating_point() or isfinite(_largest(values))


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN if any value is."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))
