"""Every base of the table, from a folder to a merged model: snapshot, twin, two training steps, merge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_core.artifacts import Adapter, MergedModel, ModelSnapshot, PreparedDataset, Twin
from qlora_core.errors import MergeError, SourceError
from qlora_core.events import Event, Note, ignore
from qlora_core.hub.resolve import find_twin, resolve
from qlora_core.hub.snapshot import build
from qlora_core.hub.twin_proof import prove
from qlora_core.merging.merge import merge
from qlora_core.modeling.bases import kind_of_base
from qlora_core.modeling.load import load_base
from qlora_core.modeling.lora import add_lora
from qlora_core.modeling.loss import collate, token_loss
from qlora_core.modeling.rows import TokenRow
from qlora_core.recipe import LocalSource, Lora, MergeRecipe, Quantization, TrainRecipe
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.pack import pack_rows
from qlora_core.training.spec import TrainSpec
from qlora_core.training.worker import run
from tests.quantized import quantize_like_auto_gptq, quantize_with_bitsandbytes
from tests.tiny import prepare_rows, write_model

CPU = torch.device("cpu")
RECIPE = TrainRecipe(lora=Lora(rank=4, alpha=8), max_steps=2, effective_batch_rows=4, learning_rate=1e-2, processes=1)
MAKERS = {
    "gptq-int4": lambda model, into: quantize_like_auto_gptq(model, into, 4),
    "gptq-int8": lambda model, into: quantize_like_auto_gptq(model, into, 8),
    "bnb-nf4": lambda model, into: quantize_with_bitsandbytes(model, into, "nf4"),
    "bnb-fp4": lambda model, into: quantize_with_bitsandbytes(model, into, "fp4"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "Tiny")


GPTQ = pytest.mark.gptq
KINDS = [pytest.param(kind, marks=GPTQ if kind.startswith("gptq") else ()) for kind in MAKERS]


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, plain: Path, tmp_path_factory) -> ModelSnapshot:
    """As the download stage leaves it, still without a twin."""
    folder = MAKERS[request.param](plain, plain.parent / f"Tiny-{request.param}")
    base = snapshot_of(folder, tmp_path_factory.mktemp("base"), "q")
    assert base.quantization == request.param
    return base


def snapshot_of(folder: Path, into: Path, digest: str) -> ModelSnapshot:
    """What the child of the download stage makes of the folder's files."""
    shutil.copytree(folder, into / "model")
    asked = {"into": into / "model", "gguf": None, "source": f"local {folder.name}", "revision": "1"}
    return build(asked, ignore).model_copy(update={"digest": digest * 64})


def matched(base: ModelSnapshot, plain: Path, work: Path) -> ModelSnapshot:
    twin = snapshot_of(plain, work / "twin", "t")
    proof = prove({"quantized": base.model_dump(), "twin": twin.model_dump()}, ignore)
    return base.model_copy(update={"twin": Twin(model=twin, proof=proof)})


def trained(base: ModelSnapshot, dataset: PreparedDataset, into: Path, events: list[Event]) -> Adapter:
    into.mkdir()
    spec = TrainSpec(recipe=RECIPE, seed=3, base=base, dataset=dataset, into=into)
    return run(spec.model_dump(mode="json"), events.append).model_copy(update={"digest": "a" * 64})


@pytest.mark.slow
def test_a_quantized_base_trains_and_merges_into_its_twin(quantized: ModelSnapshot, plain: Path, tmp_path: Path):
    dataset = prepare_rows(quantized, tmp_path / "rows")
    base = matched(quantized, plain, tmp_path)
    events: list[Event] = []
    adapter = trained(base, dataset, tmp_path / "train", events)
    assert adapter.base_digest == quantized.digest
    assert any("Linear" in event.message and "layers" in event.message for event in events if isinstance(event, Note))
    merged = merge(MergeRecipe(), base, adapter, dataset, tmp_path / "merge", ignore, RECIPE.quantization)
    assert_merged(merged, plain)


def assert_merged(merged: MergedModel, plain: Path) -> None:
    """In full precision, every linear layer changed, and with the loss of what was trained on measured beside it."""
    assert merged.base_digest == "t" * 64
    config = json.loads((merged.path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    before, after = load_file(plain / "model.safetensors"), load_file(merged.path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}
    assert set(merged.proof.losses) == {"quantized_base_and_adapter", "base", "base_and_adapter", "merged"}
    assert merged.proof.losses["quantized_base_and_adapter"] == pytest.approx(merged.proof.losses["merged"], abs=0.5)


def test_gradients_flow_through_every_quantized_layer_even_after_a_pass_without(quantized: ModelSnapshot):
    """GPTQModel's CPU kernel would drop them for good after such a pass; the adapter would learn from half of them."""
    torch.manual_seed(1)
    model = load_base(quantized, CPU, Quantization())
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        weight = layer(torch.eye(64))
    inputs = torch.randn(3, 64, requires_grad=True)
    towards = torch.randn(3, weight.shape[1])
    layer(inputs).backward(towards)
    assert inputs.grad is not None
    expected = towards @ weight.T
    # bitsandbytes makes weights that were stored from float16 in float16 again, for the backward pass only: 2^-11 each
    assert torch.linalg.vector_norm(inputs.grad - expected) < 1e-3 * torch.linalg.vector_norm(expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.requires_grad for parameter in add_lora(model, Lora(rank=2)).parameters()) == 2 * 7 * 2


def test_the_fused_engine_computes_what_peft_computes_on_it(quantized: ModelSnapshot):
    """bitsandbytes rounds to float16 in its backward pass, and GPTQModel sums in another order."""
    torch.manual_seed(1)
    model = add_lora(load_base(quantized, CPU, Quantization()), Lora(rank=4, alpha=8)).train()
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in adapter.values():
        torch.nn.init.normal_(parameter.data, 0, 0.1)
    rows = [TokenRow("", np.arange(3, 3 + size, dtype=np.int32), np.ones(size, np.uint8)) for size in (40, 25)]
    loss = token_loss(model.get_base_model(), collate(rows, 0)).loss_sum
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in adapter.items()}
    engine = Engine(model, torch.float32)
    assert engine.loss_and_grads(pack_rows(rows, False), torch.zeros(1)).item() == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in expected.items():
        difference = torch.linalg.vector_norm(adapter[name].grad - gradient)
        assert difference < 1e-2 * torch.linalg.vector_norm(gradient), name


def test_a_quantized_base_predicts_about_what_its_twin_predicts(quantized: ModelSnapshot, plain: Path):
    """Zero points stored minus one (format v1) and read as they stand would shift every weight."""
    ids = torch.arange(3, 40)[None]
    expected = load_base(snapshot_plain(plain), CPU, Quantization())(input_ids=ids).logits
    found = load_base(quantized, CPU, Quantization())(input_ids=ids).logits
    assert torch.linalg.vector_norm(found - expected) < 0.35 * torch.linalg.vector_norm(expected)


def snapshot_plain(plain: Path) -> ModelSnapshot:
    from qlora_core.modeling.load import read_architecture

    return ModelSnapshot(path=plain, source="tiny", revision="1", architecture=read_architecture(plain))


def test_the_twin_of_a_folder_is_found_beside_it(quantized: ModelSnapshot, plain: Path, tmp_path: Path):
    folder = plain.parent / "Tiny-Int4"
    base = resolve(LocalSource(source="local", path=plain), "model", tmp_path)
    named = base.model_copy(update={"source": LocalSource(source="local", path=folder)})
    assert find_twin(named, quantized, None, tmp_path).source == LocalSource(source="local", path=plain)


def test_a_proof_of_other_models_is_no_reason_to_merge(quantized: ModelSnapshot, plain: Path, tmp_path: Path):
    dataset = prepare_rows(quantized, tmp_path / "rows")
    base = matched(quantized, plain, tmp_path).model_copy(update={"digest": "x" * 64})
    adapter = Adapter(
        path=tmp_path, digest="a" * 64, base_digest=base.digest, data_digest=dataset.digest, steps=1, rank=4,
        trainable_parameters=1, train_loss=1.0, evaluation_loss=1.0,
    )  # fmt: skip
    with pytest.raises(MergeError, match="prove them anew"):
        merge(MergeRecipe(), base, adapter, dataset, tmp_path / "merge", ignore)


@pytest.mark.parametrize(
    "kind", ["awq-int4", "aqlm", "eetq", "hqq", "fp8", "bnb-int8", "compressed-tensors", "gptq-int3"]
)
def test_a_base_that_cannot_train_is_refused_with_why_and_what_to_take(kind: str):
    with pytest.raises(SourceError, match=rf"quantized as {kind}.*cannot be trained: .*full precision.*gptq-int4"):
        kind_of_base(kind, "huggingface acme/tiny")
