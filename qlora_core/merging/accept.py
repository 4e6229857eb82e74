"""The proof over all tensors of a merge: which changed and by how much, and that no other did."""

from collections.abc import Collection, Mapping, Sequence
from math import isfinite, sqrt

from qlora_core.artifacts import TensorChange
from qlora_core.errors import MergeError
from qlora_core.merging.difference import Difference
from qlora_core.merging.tensors import Shard, StoredTensor


def accept(differences: Mapping[str, Difference], changed: Collection[str]) -> tuple[TensorChange, ...]:
    """How far each of the `changed` tensors moved, in the order they were written.

    Raises:
        MergeError: a value is not finite, or rounding to the output dtype swallowed every change.
    """
    for name, found in differences.items():
        if not isfinite(found.largest):
            what = "; take a wider merge.dtype" if name in changed else " in the base as well; take another base"
            raise MergeError(f"proof of the merge: {name} holds NaN or infinity{what}")
    moved = tuple(_change(name, differences[name]) for name in differences if name in changed)
    if not any(change.largest for change in moved):
        raise MergeError(
            "proof of the merge: rounding swallowed every change, so the merged model is the base; "
            "train longer or take merge.dtype: float32"
        )
    return moved


def check_places(shards: Sequence[Shard], written: Mapping[str, StoredTensor]) -> None:
    """Read anew, the headers on the disk must put every tensor where it was written, and no other tensor anywhere.

    Raises:
        MergeError: they do not.
    """
    meant = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    wrong = sorted(name for name in meant.keys() | written.keys() if meant.get(name) != written.get(name))
    if wrong:
        raise MergeError(f"proof of the merge: these tensors do not stand where they belong: {', '.join(wrong[:3])}")


def _change(name: str, found: Difference) -> TensorChange:
    relative = sqrt(found.change_squared / found.base_squared) if found.base_squared else 0.0
    return TensorChange(name=name, largest=found.largest, relative=relative)
