"""NEFTune: noise on the embeddings while training (arXiv:2310.05914)."""

from math import sqrt
from typing import Any

import torch
from transformers import PreTrainedModel


def add_embedding_noise(model: PreTrainedModel, alpha: float) -> None:
    """Let the embeddings of a model in training mode be off by up to alpha / sqrt(tokens x width) in every value."""

    def noisy(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        reach = alpha / sqrt(output.shape[1] * output.shape[2])
        return output + torch.empty_like(output).uniform_(-reach, reach)

    model.get_input_embeddings().register_forward_hook(noisy)
