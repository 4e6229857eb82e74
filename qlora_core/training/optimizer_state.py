"""The state of a torch or bitsandbytes optimizer as named tensors, and back."""

from typing import Any

import torch

from qlora_core.training.optimizer import Parameters

PREFIX = "optimizer."


def optimizer_tensors(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`optimizer.KEY.PARAMETER` to value."""
    return {
        f"{PREFIX}{key}.{name}": torch.as_tensor(value).contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    tensors: dict[str, torch.Tensor], parameters: Parameters, optimizer: torch.optim.Optimizer
) -> None:
    """Put the state back where the optimizer keeps it."""
    for name, parameter in parameters.items():
        found = {
            key.split(".", 2)[1]: value
            for key, value in tensors.items()
            if key.startswith(PREFIX) and key.split(".", 2)[2] == name
        }
        optimizer.state[parameter] = {key: _placed(key, value, parameter, optimizer) for key, value in found.items()}


def _placed(key: str, value: torch.Tensor, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    """Moments live beside their parameter; a count of steps is on the CPU unless AdamW is fused.

    bitsandbytes counts in a plain integer.
    """
    if key == "step" and not value.is_floating_point():
        return int(value)
    on_cpu = key == "step" and not optimizer.defaults.get("fused")
    return value if on_cpu else value.to(parameter.device)
