"""An adapter as the changes it makes to tensors of the base: W + scale * B A (LoRA, arXiv:2106.09685)."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from qlora_core.errors import MergeError
from qlora_core.merging.tensors import FLOATS, StoredTensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = "lora_A.weight", "lora_B.weight"

UNDERSTOOD = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
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


@dataclass(frozen=True)
class LowRank:
    """W + left @ right, where `left` `[rows, rank]` carries the scale and `right` is `[rank, columns]`, both fp32."""

    left: torch.Tensor
    right: torch.Tensor

    def apply(self, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """Add to fp32 rows `[n, columns]` of the base tensor in place, starting at `first_row`."""
        return weight.addmm_(self.left[first_row : first_row + len(weight)], self.right)


def read_changes(adapter: Path, base: Mapping[str, StoredTensor]) -> dict[str, LowRank]:
    """What the adapter changes, by the name of the base tensor.

    Raises:
        MergeError: the adapter does not fit the base, would change nothing, is not finite, or uses a feature of PEFT
            that cannot be merged here.
    """
    config = _read_config(adapter)
    tensors = {name.removeprefix(PREFIX): tensor.float() for name, tensor in load_file(adapter / WEIGHTS).items()}
    _refuse_non_finite(tensors)
    modules = _modules(tensors)
    if not any(bool(tensors[f"{module}.{B}"].any()) for module in modules):
        raise MergeError(
            f"every B of the adapter at {adapter} is zero, so merging would change nothing; it was not trained or "
            "not saved whole, train it again"
        )
    return {f"{module}.weight": _low_rank(module, tensors, config, base) for module in modules}


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
        if name not in UNDERSTOOD | IRRELEVANT and value and value != defaults.get(name)
    }
    if foreign:
        named = ", ".join(f"{name}={value}" for name, value in sorted(foreign.items()))
        raise MergeError(f"the adapter at {adapter} uses {named}, which cannot be merged; train without it")
    return LoraConfig(**{name: settings[name] for name in UNDERSTOOD & settings.keys()})


def _refuse_non_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise MergeError(f"{name} of the adapter holds NaN or infinity; take an earlier checkpoint or train again")


def _modules(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    modules = sorted(name.removesuffix(f".{A}") for name in tensors if name.endswith(f".{A}"))
    expected = {f"{module}.{part}" for module in modules for part in (A, B)}
    foreign = sorted(expected ^ tensors.keys())
    if foreign or not modules:
        what = ", ".join(foreign[:3]) or "nothing"
        raise MergeError(f"the adapter's tensors must be pairs of {A} and {B}; out of place or missing: {what}")
    return modules


def _low_rank(
    module: str, tensors: Mapping[str, torch.Tensor], config: LoraConfig, base: Mapping[str, StoredTensor]
) -> LowRank:
    weight = base.get(f"{module}.weight")
    if weight is None:
        raise MergeError(f"the adapter changes {module}, which the base does not have; it was trained on another model")
    right, left = tensors[f"{module}.{A}"], tensors[f"{module}.{B}"]
    rank = _by_pattern(config.rank_pattern, module, config.r)
    if len(right) != rank or left.shape[1] != rank:
        raise MergeError(
            f"{module} has A {list(right.shape)} and B {list(left.shape)}, and {CONFIG} says rank {rank}; "
            "r and rank_pattern must be those the adapter was trained with"
        )
    if weight.shape != (left.shape[0], right.shape[1]):
        raise MergeError(
            f"{module} of the base is {list(weight.shape)} and the adapter changes {[left.shape[0], right.shape[1]]}; "
            "it was trained on another model"
        )
    if weight.dtype not in FLOATS:
        raise MergeError(f"{weight.name} is stored as {weight.dtype}; merge into one of {', '.join(FLOATS)}")
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    scale = alpha / (sqrt(rank) if config.use_rslora else rank)
    return LowRank(left * scale, right)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name from a dot on."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
