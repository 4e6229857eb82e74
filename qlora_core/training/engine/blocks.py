"""The decoder blocks of a model as the engine reads them."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from qlora_core.training.engine.adapter import FlatAdapter
from qlora_core.training.engine.families import FAMILIES, GROUPS, blocks_of, linears
from qlora_core.training.engine.linear import Group, group_of
from qlora_core.training.engine.pack import Pack
from qlora_core.training.engine.quack import Quack


class Block(NamedTuple):
    """One decoder block."""

    input_norm: torch.Tensor
    qkv: Group
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: Group
    mlp_norm: torch.Tensor
    gate_up: Group
    down: Group


class Kept(NamedTuple):
    """What a block keeps between its forward and its backward; what is None is computed again."""

    entry: torch.Tensor
    """Residual stream before the block."""
    qkv: torch.Tensor | None = None
    """As projected when heads are normed, else with queries and keys rotated."""
    out: torch.Tensor | None = None
    """Attention's output."""
    log_sum: torch.Tensor | None = None
    middle: torch.Tensor | None = None
    """Residual stream after attention."""
    gate_up: torch.Tensor | None = None
    gate_up_low: torch.Tensor | None = None
    """Of what is still to be added to `gate_up`."""
    low: torch.Tensor | None = None
    """What the first matrix of `down`'s adapter made of its input."""


class Context(NamedTuple):
    """What all blocks read in one pass."""

    pack: Pack
    cos: torch.Tensor
    sin: torch.Tensor
    seed: torch.Tensor | None


def read_blocks(model: PreTrainedModel, adapter: FlatAdapter, dtype: torch.dtype, quack: Quack) -> list[Block]:
    """All blocks, in order."""
    normed = FAMILIES[model.config.model_type].head_norms
    return [_read_block(block, normed, adapter, dtype, quack) for block in blocks_of(model)]


def _read_block(block: torch.nn.Module, normed: bool, adapter: FlatAdapter, dtype: torch.dtype, quack: Quack) -> Block:
    groups = {name: group_of(linears(block, name), adapter, dtype, quack) for name in GROUPS}
    heads = (_norm(block, "self_attn.q_norm"), _norm(block, "self_attn.k_norm")) if normed else None
    return Block(
        input_norm=_norm(block, "input_layernorm"),
        head_norms=heads,
        mlp_norm=_norm(block, "post_attention_layernorm"),
        **groups,
    )


def _norm(block: torch.nn.Module, path: str) -> torch.Tensor:
    weight: torch.Tensor = block.get_submodule(path).weight.detach()  # type: ignore[operator]
    return weight
