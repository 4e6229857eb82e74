"""Small random models and rows that the tests of the engine share."""

from collections.abc import Sequence

import numpy as np
import torch

from qlora_core.modeling.rows import TokenRow

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
