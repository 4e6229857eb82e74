"""The optimizer of the adapter's parameters."""

from typing import Any

import torch

from qlora_core.events import Note, Report
from qlora_core.recipe import TrainRecipe

Parameters = dict[str, torch.nn.Parameter]
LR_SCALE = "lr_scale"
"""Key of a parameter group: how many times the scheduled learning rate it gets."""


def build_optimizer(
    recipe: TrainRecipe, parameters: Parameters, device: torch.device, report: Report
) -> torch.optim.Optimizer:
    """AdamW as the recipe wants it; the paged and the 8-bit ones are bitsandbytes' and need a GPU.

    On a CPU torch's AdamW stands in for those: its state is small for an adapter, and there is nothing to page to.
    """
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (0.9, recipe.adam_beta2),
        "weight_decay": recipe.weight_decay,
    }
    groups = parameter_groups(parameters, recipe.lora.plus_ratio)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=device.type == "cuda")
    if device.type != "cuda":
        report(Note(message=f"optimizer {recipe.optimizer} needs a CUDA device; here torch's AdamW in fp32 is used"))
        return torch.optim.AdamW(groups, **options)
    from bitsandbytes import optim

    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    made: torch.optim.Optimizer = kinds[recipe.optimizer](groups, **options)
    return made


def parameter_groups(parameters: Parameters, plus_ratio: float) -> list[dict[str, Any]]:
    """One group, or under LoRA+ two: the output matrices B learn `plus_ratio` times as fast (arXiv:2402.12354)."""
    if plus_ratio == 1:
        return [{"params": list(parameters.values()), LR_SCALE: 1.0}]
    fast = [p for name, p in parameters.items() if ".lora_B." in name]
    slow = [p for name, p in parameters.items() if ".lora_B." not in name]
    return [{"params": slow, LR_SCALE: 1.0}, {"params": fast, LR_SCALE: plus_ratio}]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the scheduled rate, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[LR_SCALE]
