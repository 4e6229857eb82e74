"""Small random models and rows that the tests of the engine share."""

from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qlora_core.modeling.rows import TokenRow
from qlora_core.training.engine import ops
from qlora_core.training.engine.operands import Masks

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomize(model: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    """Norms and biases that are not all one or zero, and weights scaled up, so that a mistake anywhere shows."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
        else:
            parameter.data.mul_(scale)
    return model


def random_rows(vocabulary: int, lengths: Sequence[int]) -> list[TokenRow]:
    """Rows of random tokens of which half carry loss, never the first."""
    random = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(lengths):
        mask = (random.random(length) < 0.5).astype(np.uint8)
        mask[0] = 0
        rows.append(TokenRow(str(number), random.integers(0, vocabulary, length).astype(np.int32), mask))
    return rows


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


class KnownDropout(torch.nn.Module):
    """The engine's dropout as a layer, so that PEFT's own forward draws the same masks."""

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self._masks = masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(x.numel() // x.shape[-1], x.shape[-1], device=x.device)
        return x * ops.dropout(ones, self._masks, None).view_as(x)


def give_known_dropout(model: PeftModel, rate: float, seed: torch.Tensor) -> None:
    """Make PEFT's forward draw the masks that the engine makes of a seed."""
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, LoraLayer)):
        layer.lora_dropout["default"] = KnownDropout(Masks(seed, number, 1, rate))
