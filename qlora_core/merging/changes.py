"""What a merge does to one tensor, a block of rows at a time."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Change(Protocol):
    """From rows of the base tensor to rows of the merged one."""

    def apply(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """Take fp32 rows `[n, columns]` of the base from `first_row` on, and return the merged ones; may overwrite."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + left @ right (LoRA, arXiv:2106.09685): `left` `[rows, rank]` carries the scale, `right` `[rank, columns]`."""

    left: torch.Tensor
    right: torch.Tensor

    def apply(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """Add the product."""
        return weight.addmm_(self.left[first_row : first_row + len(weight)], self.right)


@dataclass(frozen=True)
class Dora:
    """magnitude * (W + left @ right), each row divided by its norm (DoRA, arXiv:2402.09353)."""

    low_rank: LowRank
    magnitude: torch.Tensor
    """Norms of the merged rows, `[rows]`."""

    def apply(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """Add the product and give every row its norm; a block holds whole rows."""
        moved = self.low_rank.apply(weight, first_row)
        factor = self.magnitude[first_row : first_row + len(weight)] / torch.linalg.vector_norm(moved, dim=1)
        return moved.mul_(factor[:, None])


@dataclass(frozen=True)
class Replace:
    """The tensor that was trained in place of the base's: `modules_to_save` and trained biases."""

    values: torch.Tensor

    def apply(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """Take the trained rows."""
        return self.values[first_row : first_row + len(weight)].float().view_as(weight)
