"""Put a LoRA adapter on a model through PEFT."""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qlora_core.errors import TrainingError
from qlora_core.recipe import Lora

IN_BLOCK = re.compile(r"\.\d+\.")
"""A module inside a numbered block: `model.layers.3.mlp.up_proj`, `transformer.h.3.attn.c_attn`."""


def add_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """The model with a fresh adapter on it; only the adapter trains, in fp32.

    Raises:
        TrainingError: the recipe names modules that the model does not have.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # PEFT declares int and computes alpha / rank
        lora_dropout=lora.dropout,
        bias="none",
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=sorted(target_modules(model, lora.target_modules)),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert isinstance(adapted, PeftModel)
    return adapted


def target_modules(model: torch.nn.Module, wanted: str | tuple[str, ...]) -> set[str]:
    """Last names of the linear layers that get an adapter: those named, or all inside the decoder's blocks.

    `all-linear` is answered here and not by PEFT, which finds nothing on a GPTQ model.
    """
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if IN_BLOCK.search(name) and "Linear" in type(module).__name__
    }
    if wanted == "all-linear":
        return found
    unknown = sorted(set(wanted) - found)
    if unknown:
        raise TrainingError(
            f"train.lora.target_modules names {', '.join(unknown)}; this model has {', '.join(sorted(found))}"
        )
    return set(wanted)
