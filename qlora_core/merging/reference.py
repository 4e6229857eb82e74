"""What a merge must hold, computed by PEFT: every changed weight before it is rounded, and a model that holds it.

The files are compared with these weights element by element. No threshold is involved: two fp32 sums of the same terms
differ by less than a bound that follows from the terms (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
section 3.1), and rounding is monotonic, so a right element lies between the two roundings of the ends of that interval.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import Parameter
from transformers import PreTrainedModel

from qlora_core.errors import MergeError
from qlora_core.merging.blocks import Opened, Scratch, opened
from qlora_core.merging.difference import same_bits
from qlora_core.merging.tensors import StoredTensor

ADAPTER = "default"
UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2
SAVED = f".modules_to_save.{ADAPTER}."


class Exact(NamedTuple):
    """A merged weight before it is rounded."""

    name: str
    """Of the tensor in the files."""
    parameter: Parameter
    """What holds it in the model in memory."""
    values: torch.Tensor
    """fp32, in the shape of the parameter."""
    tolerance: torch.Tensor
    """How far fp32 sums of the same terms in another order may be from `values`; broadcasts against them."""


def with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The model with the adapter on it through PEFT, ready for inference."""
    adapted = PeftModel.from_pretrained(model, str(adapter), torch_device=str(model.device))
    assert isinstance(adapted, PeftModel)
    adapted.eval()
    return adapted


@torch.inference_mode()
def round_in_memory(adapted: PeftModel, base: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> bool:
    """Merge the adapter into the model in memory, every weight rounded as a file of `dtype` would round it.

    Returns whether any weight differs from the base's after rounding.

    Args:
        adapted: base and adapter; afterwards it predicts by its merged weights alone.
        base: the tensors of the base.
        dtype: of the files; None gives each tensor its dtype in the base.
    """
    adapted.merge_adapter()
    moved = False
    with _reader(base) as read:
        for exact in exact_weights(adapted, base):
            before = read(exact.name).to(exact.values.device).view(exact.values.shape)
            kind = dtype or before.dtype
            rounded = exact.values.to(kind)
            moved = moved or not torch.equal(rounded, before.to(kind))
            exact.parameter.copy_(rounded)
    _round_unchanged(adapted, dtype)
    return moved


@torch.inference_mode()
def hold_stored(
    adapted: PeftModel,
    base: Mapping[str, StoredTensor],
    merged: Mapping[str, StoredTensor],
    changed: Collection[str],
    dtype: torch.dtype | None,
) -> None:
    """Compare every tensor of the files with what it must hold, and give the model in memory the changed ones.

    Afterwards the model has the architecture, the ties and the unchanged weights of the base and the changed weights of
    the files, so that the merged folder must predict what it predicts.

    Args:
        adapted: base and adapter.
        base: the tensors of the base.
        merged: the tensors of the merged model.
        changed: names of those that the adapter changes; every other one must be the base's.
        dtype: what every tensor was cast to; None if each kept its dtype.

    Raises:
        MergeError: a weight is not the base's plus what the adapter adds, rounded once; or another tensor is missing,
            or not the base's.
    """
    adapted.merge_adapter()
    with _reader(merged) as read:
        for exact in exact_weights(adapted, base):
            stored = read(exact.name).to(exact.values.device).view(exact.values.shape)
            _check(exact, stored)
            exact.parameter.copy_(stored)
    _check_unchanged(base, merged, changed, dtype)
    _round_unchanged(adapted, dtype)


@torch.inference_mode()
def exact_weights(adapted: PeftModel, base: Mapping[str, StoredTensor]) -> Iterator[Exact]:
    """Every weight that the adapter changes and that a file holds; one is in memory at a time.

    Sums start from the base's files and not from the model, which may hold them in a coarser dtype.
    """
    model = adapted.get_base_model()
    with _reader(base) as read:
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and ADAPTER in module.r:
                yield from (exact for exact in _of_layer(path, module, read) if exact.name in base)
    for path, parameter in model.named_parameters():
        name = _trained_whole(path, adapted)
        if name is not None and name in base:
            coarse = 0.0 if parameter.dtype == torch.float32 else torch.finfo(parameter.dtype).eps
            values = parameter.detach().float()
            yield Exact(name, parameter, values, values.abs() * coarse)


class _Reader(NamedTuple):
    """Reads whole tensors; what it returned is overwritten by its next call."""

    tensors: Mapping[str, StoredTensor]
    files: Opened
    scratch: Scratch

    def __call__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return self.files.read(tensor, 0, tensor.rows, self.scratch, "whole")


@contextmanager
def _reader(tensors: Mapping[str, StoredTensor]) -> Iterator[_Reader]:
    with opened({tensor.file for tensor in tensors.values()}) as files:
        yield _Reader(tensors, files, Scratch())


def _of_layer(path: str, module: LoraLayer, read: _Reader) -> Iterator[Exact]:
    """A layer's weight with LoRA (arXiv:2106.09685) or DoRA (arXiv:2402.09353), and its bias if that is changed too."""
    layer, name = module.get_base_layer(), f"{path}.weight"
    if name not in read.tensors:
        return  # tied to a tensor that is stored under another name
    added = module.get_delta_weight(ADAPTER).detach().float()
    left, right = _factors(module)
    before = read(name).to(added.device, torch.float32).view(added.shape)
    values = before + added
    roundings = left.shape[1] + 3  # of one element: its products, their sum, the scale, and the base's own value
    tolerance = (left.abs() @ right.abs()).add_(before.abs()).mul_(2 * roundings * UNIT_ROUNDOFF)
    if ADAPTER in module.lora_magnitude_vector:
        values, tolerance = _scaled_rows(values, tolerance, module.lora_magnitude_vector[ADAPTER].weight.detach())
    yield Exact(name, layer.weight, values, tolerance)
    if module.lora_bias.get(ADAPTER, False):
        bias = module.lora_B[ADAPTER].bias.detach().float() * module.scaling[ADAPTER]
        before = read(f"{path}.bias").to(bias.device, torch.float32).view(bias.shape)
        values = before + bias
        yield Exact(f"{path}.bias", layer.bias, values, (values.abs() + bias.abs()) * 2 * UNIT_ROUNDOFF)


def _factors(module: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT's product is made of, scale included, as stored: fp32 `[rows, rank]` and `[rank, columns]`."""
    if ADAPTER in module.lora_embedding_A:
        left, right = module.lora_embedding_A[ADAPTER].T, module.lora_embedding_B[ADAPTER].T
    else:
        left, right = module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].weight
        if module.fan_in_fan_out:
            left, right = right.T, left.T
    return left.detach().float() * module.scaling[ADAPTER], right.detach().float()


def _scaled_rows(
    values: torch.Tensor, tolerance: torch.Tensor, magnitude: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DoRA: each row divided by its norm, times its magnitude; errors of the norm are added to the tolerance."""
    norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    factor = magnitude.float().view(-1, 1) / norms
    of_norm = torch.linalg.vector_norm(tolerance, dim=1, keepdim=True) / norms
    relative = of_norm + 2 * (values.shape[1] + 3) * UNIT_ROUNDOFF
    return values * factor, (tolerance + values.abs() * relative) * factor.abs()


def _trained_whole(path: str, adapted: PeftModel) -> str | None:
    """The name in the files of a parameter that was trained in place of the base's, or None if it is no such one."""
    if SAVED in path:
        return path.replace(SAVED, ".")
    bias = adapted.peft_config[ADAPTER].bias != "none" and path.endswith(".bias") and "lora_" not in path
    return path.replace(".base_layer.", ".") if bias else None


def _check(exact: Exact, stored: torch.Tensor) -> None:
    low, high = ((exact.values + sign * exact.tolerance).to(stored.dtype) for sign in (-1, 1))
    wrong = int(((stored < low) | (stored > high)).count_nonzero())
    if wrong:
        raise MergeError(
            f"proof of the merge: {wrong:,} of {stored.numel():,} elements of {exact.name} are not the base plus what "
            "PEFT adds, rounded once; nothing was registered. This is a defect of the merge, please report it with "
            "the adapter"
        )


def _check_unchanged(
    base: Mapping[str, StoredTensor],
    merged: Mapping[str, StoredTensor],
    changed: Collection[str],
    dtype: torch.dtype | None,
) -> None:
    wrong = sorted(base.keys() ^ merged.keys())
    with _reader(base) as read, _reader(merged) as read_merged:
        for name in sorted((base.keys() & merged.keys()) - set(changed)):
            before = read(name)
            meant = before.to(dtype) if dtype is not None and before.is_floating_point() else before
            if not same_bits(meant, read_merged(name)):
                wrong.append(name)
    if wrong:
        raise MergeError(
            f"proof of the merge: {', '.join(wrong[:3])} should be the base's and {'is' if len(wrong) == 1 else 'are'} "
            "not; nothing was registered. This is a defect of the merge, please report it with the base's name"
        )


def _round_unchanged(adapted: PeftModel, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    for path, parameter in adapted.get_base_model().named_parameters():
        if "lora_" not in path:
            parameter.copy_(parameter.to(dtype))
