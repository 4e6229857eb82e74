"""An adapter in PEFT's format as changes to tensors of the base."""

import json
import re
from collections.abc import Mapping
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from qlora_core.errors import MergeError, refusing
from qlora_core.merging.changes import Change, Dora, LowRank, Replace
from qlora_core.merging.tensors import FLOATS, StoredTensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDED = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
ADDED_BIAS = "lora_B.bias"
PARTS = (*LINEAR, *EMBEDDED, MAGNITUDE, ADDED_BIAS)
"""Last parts of the names of tensors that belong to LoRA; every other tensor was trained whole."""

MERGED_HERE = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias"),
        *("bias", "modules_to_save", "ensure_weight_tying"),
    }
)
"""Settings of PEFT that decide the merged weights and are followed here."""

IRRELEVANT = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("megatron_core", "qalora_group_size"),
    }
)
"""Settings that only matter while training: what they chose can be seen in the adapter's tensors."""


class _Loaded(NamedTuple):
    config: LoraConfig
    tensors: dict[str, torch.Tensor]


def read_changes(adapter: Path, base: Mapping[str, StoredTensor], tied: bool) -> dict[str, Change]:
    """What the adapter changes, by the name of the base tensor.

    Args:
        adapter: PEFT's folder.
        base: the tensors of the base.
        tied: whether the base's head is its embedding, stored once.

    Raises:
        MergeError: the adapter does not fit the base, would change nothing, is not finite, or uses a feature of PEFT
            that cannot be merged here.
    """
    with refusing(MergeError, f"the adapter at {adapter}"):
        return _read_changes(_Loaded(_read_config(adapter), _read_tensors(adapter)), base, tied)


def _read_changes(loaded: _Loaded, base: Mapping[str, StoredTensor], tied: bool) -> dict[str, Change]:
    if tied:
        _fold_tied_head(loaded.tensors)
    changes: dict[str, Change] = {}
    for module in sorted({_module(name) for name in loaded.tensors if name.endswith(PARTS)}):
        changes |= _lora(module, loaded, base)
    for name in sorted(loaded.tensors):
        if not name.endswith((*PARTS, ".base_layer.weight")):
            changes |= _trained_whole(name, loaded.tensors[name], base)
    return changes


def _read_config(adapter: Path) -> LoraConfig:
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise MergeError(f"{adapter} holds no {name}; an adapter in PEFT's format is needed")
    settings: dict[str, Any] = json.loads((adapter / CONFIG).read_text())
    kind = settings.pop("peft_type", None)
    if kind != "LORA":
        raise MergeError(f"the adapter at {adapter} is of kind {kind}; only LORA can be merged")
    defaults = vars(LoraConfig())
    foreign = {
        name: value
        for name, value in settings.items()
        if name not in MERGED_HERE | IRRELEVANT and value and value != defaults.get(name)
    }
    if foreign:
        named = ", ".join(f"{name}={value}" for name, value in sorted(foreign.items()))
        raise MergeError(f"the adapter at {adapter} uses {named}, which cannot be merged; train without it")
    return LoraConfig(**{name: settings[name] for name in MERGED_HERE & settings.keys()})


def _read_tensors(adapter: Path) -> dict[str, torch.Tensor]:
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}
    for name, tensor in tensors.items():
        if not isfinite(float(tensor.abs().max())):
            raise MergeError(f"{name} of the adapter holds NaN or infinity; take an earlier checkpoint or train again")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith((LINEAR[1], EMBEDDED[1]))):
        raise MergeError(
            f"every B of the adapter at {adapter} is zero, so merging would change nothing; it was not trained or "
            "not saved whole, train it again"
        )
    return tensors


def _fold_tied_head(tensors: dict[str, torch.Tensor]) -> None:
    """Drop the head's tensors where they only repeat the embedding's, as tied training leaves them.

    Raises:
        MergeError: head and embedding were trained apart, so that one stored tensor cannot be both.
    """
    head = {name.removeprefix(f"{HEAD}."): tensor for name, tensor in tensors.items() if name.startswith(f"{HEAD}.")}
    embedding = {
        name.removeprefix(f"{EMBEDDING}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{EMBEDDING}.")
    }
    as_head = {
        {EMBEDDED[0]: LINEAR[1], EMBEDDED[1]: LINEAR[0]}.get(name, name): tensor.T if name in EMBEDDED else tensor
        for name, tensor in embedding.items()
    }
    if head.keys() != as_head.keys() or not all(torch.equal(head[name], as_head[name]) for name in head):
        raise MergeError(
            f"the base ties {HEAD} to {EMBEDDING} and the adapter changes only one of them, or each in its own way; "
            "train both with PEFT's ensure_weight_tying, or neither"
        )
    for name in head:
        del tensors[f"{HEAD}.{name}"]


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]


def _lora(module: str, loaded: _Loaded, base: Mapping[str, StoredTensor]) -> dict[str, Change]:
    """The changes of one module: its weight, and its bias if LoRA added to that."""
    config, tensors = loaded
    embedded = f"{module}.{EMBEDDED[0]}" in tensors
    names = [f"{module}.{part}" for part in (EMBEDDED if embedded else LINEAR)]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise MergeError(f"the adapter holds no {missing[0]}; it was not saved whole, take an earlier checkpoint")
    a, b = (tensors[name].float() for name in names)
    scale = _scale(module, config, a, b)
    transposed = embedded or config.fan_in_fan_out
    low_rank = LowRank(a.T.contiguous() * scale, b.T.contiguous()) if transposed else LowRank(b * scale, a)
    _check_fit(f"{module}.weight", (len(low_rank.left), low_rank.right.shape[1]), base)
    changes: dict[str, Change] = {f"{module}.weight": low_rank}
    magnitude = tensors.get(f"{module}.{MAGNITUDE}")
    if magnitude is not None:
        if transposed:
            raise MergeError(f"the adapter uses DoRA on {module}, which is stored transposed; train it without DoRA")
        changes[f"{module}.weight"] = Dora(low_rank, magnitude.float().view(-1))
    added = tensors.get(f"{module}.{ADDED_BIAS}")
    if added is not None:
        _check_fit(f"{module}.bias", tuple(added.shape), base)
        changes[f"{module}.bias"] = LowRank(added.float()[:, None] * scale, torch.ones(1, 1))
    return changes


def _scale(module: str, config: LoraConfig, a: torch.Tensor, b: torch.Tensor) -> float:
    rank = _by_pattern(config.rank_pattern, module, config.r)
    if len(a) != rank or b.shape[1] != rank:
        raise MergeError(
            f"{module} has A {list(a.shape)} and B {list(b.shape)}, and {CONFIG} says rank {rank}; "
            "r and rank_pattern must be those that the adapter was trained with"
        )
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    return float(alpha / (sqrt(rank) if config.use_rslora else rank))


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name from a dot on."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _trained_whole(name: str, tensor: torch.Tensor, base: Mapping[str, StoredTensor]) -> dict[str, Change]:
    name = name.replace(".base_layer.", ".")
    _check_fit(name, tuple(tensor.shape), base)
    return {name: Replace(tensor)}


def _check_fit(name: str, shape: tuple[int, ...], base: Mapping[str, StoredTensor]) -> None:
    weight = base.get(name)
    if weight is None:
        raise MergeError(f"the adapter changes {name}, which the base does not have; it was trained on another model")
    if weight.shape != shape:
        resized = name.startswith((EMBEDDING, HEAD)) and weight.shape[1:] == shape[1:]
        why = "its vocabulary was resized, which is not supported" if resized else "it was trained on another model"
        raise MergeError(f"{name} of the base is {list(weight.shape)} and the adapter's is {list(shape)}; {why}")
    if weight.dtype not in FLOATS:
        raise MergeError(f"{name} is stored as {weight.dtype}; merge into a base of {', '.join(FLOATS)}")
