"""What the engine keeps between forward and backward, counted tensor by tensor, against what is planned."""

from functools import cache

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_core.artifacts import Architecture
from qlora_core.modeling.rows import TokenRow
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.pack import pack_rows
from qlora_core.training.pass_memory import PassShape, pass_memory
from tests.unit.training.engine_models import TARGETS

RANK, TOKENS, VOCABULARY, LAYERS = 4, 128, 1000, 2
SHAPES = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "heads": (4, 2), "head_dim": 16},
    "mistral, narrow heads": {"hidden_size": 80, "intermediate_size": 224, "heads": (4, 2), "head_dim": 16},
    "qwen2": {"hidden_size": 48, "intermediate_size": 256, "heads": (6, 1), "head_dim": 8},
    "qwen3, wide heads": {"hidden_size": 64, "intermediate_size": 96, "heads": (8, 4), "head_dim": 16},
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still live, when logits are first made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.at_head: int | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        if self.at_head is None and func is torch.ops.aten.mm.default and out.shape[-1] == VOCABULARY:
            self.at_head = self.live() - out.untyped_storage().nbytes()
        return out

    def live(self) -> int:
        self._made = {key: pair for key, pair in self._made.items() if not pair[0].expired()}
        return sum(size for _, size in self._made.values())


def facts_of(config) -> Architecture:
    return Architecture(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        context_tokens=512,
        parameters=0,
        tied_embeddings=True,
    )


@cache
def adapted(name: str, layers: int) -> PeftModel:
    sizes = dict(SHAPES[name])
    heads, kv_heads = sizes.pop("heads")
    config = AutoConfig.for_model(
        name.partition(",")[0], vocab_size=VOCABULARY, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=512, tie_word_embeddings=True, **sizes,
    )  # fmt: skip
    config.head_dim = sizes["head_dim"]
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_config(config), lora)


def at_head(name: str, policy: str, layers: int, tokens: int) -> int:
    """Bytes that live when the head begins, all of them kept by blocks but for a few of the size of the stream."""
    engine = Engine(adapted(name, layers), torch.float32, policy)
    row = TokenRow("", np.arange(tokens, dtype=np.int32), np.ones(tokens, np.uint8))
    with LiveBytes() as counted:
        engine.loss_and_grads(pack_rows([row], fill_up=False), torch.zeros(1, dtype=torch.int64))
    assert counted.at_head is not None
    return counted.at_head


@pytest.mark.parametrize("policy", ["fast", "balanced", "small"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_block_keeps_as_many_bytes_a_token_as_are_planned(name, policy):
    one, two = (
        at_head(name, policy, LAYERS + 1, tokens) - at_head(name, policy, LAYERS, tokens)
        for tokens in (TOKENS, 2 * TOKENS)
    )
    facts = facts_of(adapted(name, LAYERS).config)
    planned = [
        pass_memory(PassShape(facts, tokens, RANK, 4, host_memory=False), policy).kept / facts.layers
        for tokens in (TOKENS, 2 * TOKENS)
    ]
    assert planned[1] - planned[0] == two - one
