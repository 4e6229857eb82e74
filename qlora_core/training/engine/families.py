"""What the blocks of a model are made of: one row for each family that the engine knows."""

from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PretrainedConfig, PreTrainedModel

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears of a block that read the same input; each group is one matrix product."""


class Family(NamedTuple):
    """How a family's block differs from Llama's."""

    head_norms: bool = False
    """RMSNorm on every query and key head before the rotation."""


FAMILIES = {"llama": Family(), "mistral": Family(), "qwen2": Family(), "qwen3": Family(head_norms=True)}
"""By `model_type`; SmolLM2 is a llama."""


class Shape(NamedTuple):
    """Sizes that every block shares."""

    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_width: int
    eps: float

    @property
    def query_width(self) -> int:
        """Values of all queries of a token."""
        return self.query_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Values of all keys of a token."""
        return self.kv_heads * self.head_width


def shape_of(config: PretrainedConfig) -> Shape:
    """Of a model whose family is in the table."""
    heads = config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        eps=config.rms_norm_eps,
    )


def why_not(model: PeftModel, longest_row_tokens: int) -> str | None:
    """Why the engine cannot train this model, in words; None when it can."""
    base = model.get_base_model()
    config, adapter = base.config, model.peft_config["default"]
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and "sliding_attention" in (getattr(config, "layer_types", None) or ["full"])
    if config.model_type == "mistral":
        windowed = window is not None
    head_width = shape_of(config).head_width if config.model_type in FAMILIES else 0
    reasons = (
        (config.model_type not in FAMILIES, f"{config.model_type} is not one of {', '.join(FAMILIES)}"),
        (config.model_type in FAMILIES and config.hidden_act != "silu", "its activation is not SiLU"),
        (
            windowed and window is not None and window < longest_row_tokens,
            f"rows are longer than its attention window of {window} tokens",
        ),
        (head_width % 8 != 0 or head_width > 256, f"its heads are {head_width} wide"),
        (getattr(adapter, "use_dora", False), "DoRA needs the norm of every adapted weight"),
        (bool(getattr(adapter, "modules_to_save", None)), "modules_to_save trains whole layers"),
        (_stray_adapters(model), "an adapter sits outside the linears of its blocks"),
        (len(_scales(model)) > 1, "its adapters have different scales"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def linears(block: torch.nn.Module, group: str) -> list[torch.nn.Module]:
    """The modules of one group of a block, adapted or not."""
    return [block.get_submodule(path) for path in GROUPS[group]]


def adapted_linears(model: PreTrainedModel) -> list[LoraLayer]:
    """Every adapted linear in the order of its block's groups, whatever order a loader has put the modules into."""
    modules = [linear for block in blocks_of(model) for group in GROUPS for linear in linears(block, group)]
    return [module for module in modules if isinstance(module, LoraLayer)]


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's blocks."""
    return list(model.get_decoder().layers)


def _adapted(model: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _stray_adapters(model: PeftModel) -> bool:
    base = model.get_base_model()
    if base.config.model_type not in FAMILIES:
        return False
    known = {id(linear) for block in blocks_of(base) for group in GROUPS for linear in linears(block, group)}
    return any(id(module) not in known for module in _adapted(base))


def _scales(model: PeftModel) -> set[float]:
    return {module.scaling["default"] for module in _adapted(model)}
