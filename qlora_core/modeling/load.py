"""Load a causal language model from a folder: in full precision, or quantized on the way for QLoRA."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_core.artifacts import Architecture
from qlora_core.errors import SourceError
from qlora_core.modeling.device import compute_dtype
from qlora_core.recipe import Quantization


def load_full(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in `dtype`, by default what the device computes in, ready for inference."""
    return _load(path, device, dtype or compute_dtype(device))


def load_quantized(
    path: Path, device: torch.device, quantization: Quantization, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model with its linear layers in 4 bits and everything else in `dtype` (by default what
    the device computes in), frozen.

    Nothing is upcast: norms, embeddings and head stay in `dtype`, which trains as well as the fp32 copies
    that `peft.prepare_model_for_kbit_training` makes and needs far less memory.
    """
    dtype = dtype or compute_dtype(device)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
    )
    model = _load(path, device, dtype, quantization_config=config)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def read_architecture(path: Path) -> Architecture:
    """Architecture facts from `config.json`, and the parameter count from the safetensors headers.

    Raises:
        SourceError: the folder holds no causal language model that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is not a model folder that transformers can read: {error}") from None
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Architecture(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        vocab=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        parameters=count_parameters(path),
        tied_embeddings=tied,
    )


def count_parameters(path: Path) -> int:
    """Elements of all tensors in the folder's safetensors files; nothing but their headers is read."""
    from math import prod

    from safetensors import safe_open

    total = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _load(path: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
    return model.eval()
