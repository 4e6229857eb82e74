"""The fused engine's loss and gradients against PEFT with bitsandbytes, in fp32."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from qlora_core.artifacts import ModelSnapshot
from qlora_core.errors import TrainingError
from qlora_core.events import ignore
from qlora_core.modeling.load import load_base, read_architecture
from qlora_core.modeling.loss import collate, token_loss
from qlora_core.recipe import Quantization
from qlora_core.training.engine import graphs, ops
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.families import why_not
from qlora_core.training.engine.module import FusedLoss
from qlora_core.training.engine.pack import bucket, pack_rows
from qlora_core.training.engine.quack import Quack
from tests.unit.training.engine_models import TARGETS, give_known_dropout, random_rows, randomize, relative_difference

VOCABULARY, ROWS = 200, (10, 33, 7, 50)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "smollm": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE),
}
TOLERANCE = 1e-4


def adapted(config, folder, quantized: bool = True, **lora: object) -> PeftModel:
    """A random model with an adapter that is not zero."""
    torch.manual_seed(1)
    randomize(AutoModelForCausalLM.from_config(config), scale=4).save_pretrained(folder)
    if quantized:
        snapshot = ModelSnapshot(path=folder, source="test", revision="1", architecture=read_architecture(folder))
        base = load_base(snapshot, torch.device("cpu"), Quantization())
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        base.requires_grad_(False)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **lora}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, 0, 0.3)
    return model


def plain_pass(model: PeftModel, rows) -> tuple[float, dict[str, torch.Tensor]]:
    loss = token_loss(model.get_base_model(), collate(rows, 0)).loss_sum
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def worst(model: PeftModel, expected: dict[str, torch.Tensor]) -> float:
    parameters = dict(model.named_parameters())
    return max(relative_difference(parameters[name].grad, grad) for name, grad in expected.items())


@pytest.mark.parametrize("fill_up", [False, True], ids=["exact", "filled up"])
@pytest.mark.parametrize("memory", ["fast", "balanced", "small"])
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_every_gradient_are_those_of_peft(family, memory, fill_up, tmp_path):
    model, rows = adapted(CONFIGS[family], tmp_path), random_rows(VOCABULARY, ROWS)
    expected, gradients = plain_pass(model, rows)
    engine = Engine(model, torch.float32, memory)
    pack, seed = pack_rows(rows, fill_up), torch.zeros(1, dtype=torch.int64)
    assert engine.loss_and_grads(pack, seed).item() == pytest.approx(expected, rel=TOLERANCE)
    assert worst(model, gradients) < TOLERANCE
    assert engine.loss(pack).item() == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "gate_proj"]])
def test_any_choice_of_linears_can_be_adapted(targets, tmp_path):
    model, rows = adapted(CONFIGS["qwen2"], tmp_path, target_modules=targets), random_rows(VOCABULARY, ROWS)
    expected, gradients = plain_pass(model, rows)
    engine = Engine(model, torch.float32)
    assert engine.loss_and_grads(pack_rows(rows, False), torch.zeros(1)).item() == pytest.approx(expected, rel=1e-4)
    assert worst(model, gradients) < TOLERANCE


@pytest.mark.parametrize("apart", [False, True])
def test_weights_that_stay_dequantized_give_the_same(apart, tmp_path):
    model, rows = adapted(CONFIGS["qwen3"], tmp_path), random_rows(VOCABULARY, ROWS)
    _, gradients = plain_pass(model, rows)
    engine = Engine(model, torch.float32)
    for group in engine.groups():
        group.keep_apart() if apart else group.keep()
    engine.loss_and_grads(pack_rows(rows, False), torch.zeros(1))
    assert worst(model, gradients) < TOLERANCE


@pytest.mark.parametrize("targets", [TARGETS, ["down_proj"], ["gate_proj", "up_proj"], ["gate_proj"]], ids="-".join)
@pytest.mark.parametrize("memory", ["fast", "balanced", "small"])
def test_interleaved_gate_and_up_give_the_same(memory, targets, tmp_path, monkeypatch):
    """QuACK needs a Hopper GPU: its two gated products are written in torch here, and `tests/gpu` has them."""

    def gated(quack, x, weight):
        gate_up = x @ weight
        return gate_up, functional.silu(gate_up[:, ::2]) * gate_up[:, 1::2]

    def gated_backward(quack, grad, weight, gate_up):
        whole = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1)
        inner = ops.swiglu(whole, None, None, None)[0]
        ops.swiglu_backward(grad @ weight, whole, None, None)
        gate_up[:, ::2], gate_up[:, 1::2] = whole.chunk(2, dim=1)
        return inner

    model, rows = adapted(CONFIGS["llama"], tmp_path, target_modules=targets), random_rows(VOCABULARY, ROWS)
    expected, gradients = plain_pass(model, rows)
    engine = Engine(model, torch.float32, memory)
    engine.keep_weights(1_000_000)  # of some groups, laid out before they are interleaved
    pack, seed = pack_rows(rows, False), torch.zeros(1)
    before = engine.loss(pack).item()
    for name, function in {"can_gate": lambda *_: True, "gated": gated, "gated_backward": gated_backward}.items():
        monkeypatch.setattr(Quack, name, function)
    engine.adapter.grads.zero_()
    assert engine.loss_and_grads(pack, seed).item() == pytest.approx(expected, rel=TOLERANCE)
    assert worst(model, gradients) < TOLERANCE
    assert engine.loss(pack).item() == pytest.approx(before, rel=TOLERANCE)
    possible = targets != ["gate_proj"]
    assert [group.interleaved for group in engine.groups()] == 3 * [False, False, possible, False]


def test_modules_in_another_order_give_the_same(tmp_path):
    """GPTQModel puts the linears of a block into alphabetical order."""
    model, rows = adapted(CONFIGS["llama"], tmp_path), random_rows(VOCABULARY, ROWS)
    expected, gradients = plain_pass(model, rows)
    for block in model.get_base_model().model.layers:
        for part in (block.self_attn, block.mlp):
            part._modules = dict(sorted(part._modules.items()))
    engine = Engine(model, torch.float32)
    assert engine.loss_and_grads(pack_rows(rows, False), torch.zeros(1)).item() == pytest.approx(expected, rel=1e-4)
    assert worst(model, gradients) < TOLERANCE


def test_a_weight_that_bitsandbytes_has_repacked_is_refused(tmp_path):
    """It does so on CPUs with AVX512-BF16 in a first pass without gradients; `load_base` keeps it from that."""
    model = adapted(CONFIGS["llama"], tmp_path)
    linear = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert not linear.support_avx512bf16_for_cpu
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TrainingError, match="load_base"):
        Engine(model, torch.float32)


@pytest.mark.parametrize("memory", ["fast", "small"])
def test_dropout_is_that_of_peft_with_the_same_masks(memory, tmp_path):
    model, seed = adapted(CONFIGS["llama"], tmp_path, lora_dropout=0.3), torch.tensor([5])
    rows = random_rows(VOCABULARY, (40,))  # one row: then both see the same tokens in the same order
    engine = Engine(model, torch.float32, memory)
    loss = engine.loss_and_grads(pack_rows(rows, False), seed).item()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    give_known_dropout(model, 0.3, seed)
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    expected, _ = plain_pass(model, rows)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    assert worst(model, ours) < TOLERANCE


def test_a_step_changes_what_the_next_pass_computes(tmp_path):
    model, rows = adapted(CONFIGS["llama"], tmp_path), random_rows(VOCABULARY, ROWS)
    module = FusedLoss(model, Engine(model, torch.float32), 0.0, "auto", 512, ignore)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pack = module.collate(rows)
    before = module.loss_and_grads(pack).item()
    optimizer.step()
    module.refresh()
    after = module(pack).item()
    assert after < before
    assert after == pytest.approx(token_loss(model.get_base_model(), collate(rows, 0)).loss_sum.item(), rel=TOLERANCE)


def test_passes_recorded_with_other_kernels_are_forgotten_when_new_ones_join(tmp_path, monkeypatch):
    model, pack = adapted(CONFIGS["llama"], tmp_path), pack_rows(random_rows(VOCABULARY, ROWS), False)
    engine, said = Engine(model, torch.float32), []
    replayed, seed = (
        graphs.Replayed(engine, lambda event: said.append(event.message)),
        torch.zeros(1, dtype=torch.int64),
    )
    expected = replayed.loss_and_grads(pack, seed).item()
    replayed._recordings.add(pack.shape, "recorded with other kernels", 0)
    monkeypatch.setattr(graphs, "settle", lambda: ["flash-attn-4", "quack-kernels"])
    assert replayed.loss_and_grads(pack, seed).item() == expected
    assert said == ["steps from now on use flash-attn-4 and quack-kernels"]


@pytest.mark.parametrize(
    ("first", "said"), [(ValueError("no such tile\nat all"), "no such tile"), (AssertionError(), "AssertionError")]
)
def test_the_reason_why_no_pass_was_recorded_is_the_first_error(first, said):
    try:
        try:
            raise first
        finally:
            raise RuntimeError("the recording was invalidated")
    except RuntimeError as last:
        assert graphs._reason(last) == said
    assert graphs._reason(RuntimeError("alone")) == "alone"


def test_embedding_noise_changes_the_loss_a_little(tmp_path):
    model, rows = adapted(CONFIGS["llama"], tmp_path), random_rows(VOCABULARY, ROWS)
    engine = Engine(model, torch.float32)
    plain = FusedLoss(model, engine, 0.0, "auto", 512, ignore).loss_and_grads(pack_rows(rows, False)).item()
    noisy = FusedLoss(model, engine, 5.0, "auto", 512, ignore).loss_and_grads(pack_rows(rows, False)).item()
    assert noisy != plain
    assert noisy == pytest.approx(plain, rel=0.2)


def test_what_the_engine_cannot_do_is_said(tmp_path):
    assert why_not(adapted(CONFIGS["llama"], tmp_path), 2048) is None
    assert "DoRA" in str(why_not(adapted(CONFIGS["llama"], tmp_path, use_dora=True), 2048))
    windowed = MistralConfig(**SHAPE, sliding_window=64)
    assert "window of 64" in str(why_not(adapted(windowed, tmp_path), 128))
    assert why_not(adapted(windowed, tmp_path), 64) is None


@pytest.mark.parametrize("count", [1, 64, 65, 500, 513, 2048, 5000, 65_537])
def test_sizes_are_few_and_little_is_filling(count):
    size = bucket(count)
    assert count <= size
    assert size <= max(64, count * 1.13)
    assert bucket(size) == size
