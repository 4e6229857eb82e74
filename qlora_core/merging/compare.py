"""What the merge did to every tensor, read back from the disk and compared with the base."""

from collections.abc import Collection, Mapping
from math import isfinite, sqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_core.artifacts import TensorChange
from qlora_core.errors import MergeError
from qlora_core.merging.tensors import FLOATS, StoredTensor
from qlora_core.merging.write import Block, Opened, blocks, one_thread_each, opened


class _Difference(NamedTuple):
    """Of one block, or summed over a tensor's."""

    largest: float
    change_squared: float
    base_squared: float

    def plus(self, other: "_Difference") -> "_Difference":
        return _Difference(
            self.largest if self.largest != self.largest else max(other.largest, self.largest),
            self.change_squared + other.change_squared,
            self.base_squared + other.base_squared,
        )


def compare(
    base: Mapping[str, StoredTensor], merged: Mapping[str, StoredTensor], changed: Collection[str], threads: int
) -> tuple[TensorChange, ...]:
    """How far each of the `changed` tensors moved, in the base's order; every other one must not have moved at all.

    Raises:
        MergeError: names or shapes differ from the base, another tensor moved, a value is not finite, or rounding to
            the output dtype swallowed every change.
    """
    _same_names_and_shapes(base, merged)
    jobs = list(blocks(merged.values(), base))
    with (
        one_thread_each(threads) as each,
        opened({t.file for t in (*base.values(), *merged.values())}) as files,
    ):
        results = each(lambda block: _difference(block, files, block.target.name in changed), jobs)
    totals: dict[str, _Difference] = {}
    for job, result in zip(jobs, results, strict=True):
        name = job.target.name
        totals[name] = totals[name].plus(result) if name in totals else result
    return _accept(totals, changed)


def _same_names_and_shapes(base: Mapping[str, StoredTensor], merged: Mapping[str, StoredTensor]) -> None:
    wrong = sorted(base.keys() ^ merged.keys()) or [n for n in base if base[n].shape != merged[n].shape]
    if wrong:
        raise MergeError(f"the merged model must have the base's tensors and shapes; different: {', '.join(wrong[:3])}")


def _difference(block: Block, files: Opened, may_move: bool) -> _Difference:
    before = files.read(block.source, block.first_row, block.rows)
    after = files.read(block.target, block.first_row, block.rows)
    if not may_move:
        same = np.array_equal(_bytes(before.to(after.dtype)), _bytes(after))
        return _Difference(0.0 if same and _finite(block.target, after) else float("nan"), 0.0, 0.0)
    before, after = before.float().view(-1), after.float().view(-1)
    change = after - before
    return _Difference(float(change.abs().max()), float(change.dot(change)), float(before.dot(before)))


def _bytes(values: torch.Tensor) -> NDArray[np.uint8]:
    """The raw bytes: NaNs are compared by their bits as well, and NumPy does it ten times as fast as torch."""
    return values.view(-1).view(torch.uint8).numpy()


def _finite(tensor: StoredTensor, values: torch.Tensor) -> bool:
    """By the largest magnitude, which is NaN if any value is: many times as fast as asking every value."""
    return tensor.dtype not in FLOATS or isfinite(float(values.abs().max()))


def _accept(totals: Mapping[str, _Difference], changed: Collection[str]) -> tuple[TensorChange, ...]:
    for name, total in totals.items():
        if not isfinite(total.largest):
            what = (
                "holds NaN or infinity; take a wider merge.dtype"
                if name in changed
                else "is not the base's, though the adapter does not change it, or is not finite"
            )
            raise MergeError(f"proof of the merge: {name} {what}")
    moved = tuple(
        TensorChange(
            name=name,
            largest=total.largest,
            relative=sqrt(total.change_squared / total.base_squared) if total.base_squared else 0.0,
        )
        for name, total in totals.items()
        if name in changed
    )
    if not any(change.largest for change in moved):
        raise MergeError(
            "proof of the merge: rounding swallowed every change, so the merged model is the base; "
            "train longer or take merge.dtype: float32"
        )
    return moved
