"""Twelve ways in which a merged folder can be wrong, each made out of a right one; for any base, adapter and dtype."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from qlora_core.merging.adapter import read_changes
from qlora_core.merging.changes import LowRank
from qlora_core.merging.spec import MODEL, MergeSpec
from qlora_core.merging.tensors import read_folder

Tensors = dict[str, torch.Tensor]
COARSER = {torch.float32: torch.bfloat16, torch.float16: torch.bfloat16, torch.bfloat16: torch.float8_e4m3fn}


class Merge(NamedTuple):
    """A right merge, as tensors."""

    base: Tensors
    merged: Tensors
    added: Mapping[str, torch.Tensor]
    """What the adapter adds, in fp32, by the name of the weight."""

    def with_scale(self, scale: float) -> Tensors:
        return {name: self._rounded(name, self.added[name] * scale) for name in self.added}

    def with_added(self, name: str, added: torch.Tensor) -> Tensors:
        return {name: self._rounded(name, added)}

    def _rounded(self, name: str, added: torch.Tensor) -> torch.Tensor:
        return (self.base[name].float() + added).to(self.merged[name].dtype)


def make_wrong(case: MergeSpec, kind: str) -> bool:
    """Turn the right merge in `case.into` into a wrong one; False where that gives the right bytes again."""
    folder = case.into / MODEL
    if kind in WRONG_CONFIGS:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, **WRONG_CONFIGS[kind](config)}))
        return True
    merge = _read(case)
    wrong = WRONG_TENSORS[kind](merge)
    changed = any(not torch.equal(tensor, merge.merged[name]) for name, tensor in wrong.items())
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors = load_file(file)
        own = {name: wrong.get(name, tensor).contiguous() for name, tensor in tensors.items()}
        save_file(own, file, {"format": "pt"})
    return changed


def _read(case: MergeSpec) -> Merge:
    base, merged = _tensors(case.base.path), _tensors(case.into / MODEL)
    changes = read_changes(case.adapter.path, read_folder(case.base.path), case.base.architecture.tied_embeddings)
    added = {name: change.left @ change.right for name, change in changes.items() if isinstance(change, LowRank)}
    return Merge(base, merged, added)


def _tensors(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _left_out(merge: Merge) -> Tensors:
    name = max(merge.added, key=lambda name: float(merge.added[name].norm()))
    return {name: merge.base[name].to(merge.merged[name].dtype)}


def _exchanged(merge: Merge) -> Tensors:
    """Two weights of one shape get each other's change."""
    first = next(iter(merge.added))
    other = next(name for name in merge.added if name != first and merge.added[name].shape == merge.added[first].shape)
    return merge.with_added(first, merge.added[other]) | merge.with_added(other, merge.added[first])


def _transposed(merge: Merge) -> Tensors:
    name = next(name for name, added in merge.added.items() if added.shape[0] == added.shape[1])
    return merge.with_added(name, merge.added[name].T)


def _coarser(merge: Merge) -> Tensors:
    """Rounded to a coarser dtype on the way."""
    exact = merge.with_scale(1.0)
    return {name: tensor.to(COARSER[tensor.dtype]).to(tensor.dtype) for name, tensor in exact.items()}


def _one_element(merge: Merge) -> Tensors:
    name = next(reversed(merge.added))
    wrong = merge.merged[name].clone()
    wrong.view(-1)[wrong.abs().argmax()] *= 1.05
    return {name: wrong}


def _norm(merge: Merge) -> Tensors:
    """A tensor that the adapter leaves alone."""
    name = next(name for name in merge.merged if name.endswith("input_layernorm.weight"))
    return {name: (merge.merged[name].float() * 1.02).to(merge.merged[name].dtype)}


def _head(merge: Merge) -> Tensors:
    """The embedding (and with it a tied head), or a head of its own, shifted by a token."""
    name = next((name for name in merge.merged if name == "lm_head.weight"), "model.embed_tokens.weight")
    return {name: merge.merged[name].roll(1, dims=0)}


def _rope(config: dict[str, object]) -> dict[str, object]:
    """Positions turn at another speed; the key is where this version of transformers writes it."""
    if "rope_parameters" in config:
        return {"rope_parameters": _faster(config["rope_parameters"])}
    return {"rope_theta": 3 * float(config.get("rope_theta", 10000.0))}


def _faster(parameters: dict[str, object]) -> dict[str, object]:
    if "rope_theta" in parameters:
        return {**parameters, "rope_theta": 3 * float(parameters["rope_theta"])}
    return {kind: _faster(of_kind) for kind, of_kind in parameters.items()}


WRONG_TENSORS: dict[str, Callable[[Merge], Tensors]] = {
    "half the scale": lambda merge: merge.with_scale(0.5),
    "nine tenths of the scale": lambda merge: merge.with_scale(0.9),
    "added twice": lambda merge: merge.with_scale(2.0),
    "subtracted": lambda merge: merge.with_scale(-1.0),
    "one weight left out": _left_out,
    "two weights exchanged": _exchanged,
    "one change transposed": _transposed,
    "rounded on the way": _coarser,
    "one element wrong": _one_element,
    "an unchanged tensor changed": _norm,
    "another head": _head,
}
WRONG_CONFIGS: dict[str, Callable[[dict[str, object]], dict[str, object]]] = {"another config": _rope}
KINDS = (*WRONG_TENSORS, *WRONG_CONFIGS)
