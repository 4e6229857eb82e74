"""Merges that must not happen, each refused with its reason."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_core.artifacts import MergedModel, ModelSnapshot
from qlora_core.errors import MergeError
from qlora_core.events import ignore
from qlora_core.merging.blocks import Opened
from qlora_core.merging.logits import read_probe
from qlora_core.merging.merge import merge
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.tensors import StoredTensor
from qlora_core.merging.worker import Predictions, prove_predictions, work, write_model
from qlora_core.modeling.load import load_full
from qlora_core.store import Store
from tests.wrong_merges import KINDS, make_wrong

MakeCase = Callable[..., MergeSpec]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(case: MergeSpec) -> MergedModel:
    return merge(case.recipe, case.base, case.adapter, case.dataset, case.into, ignore)


def edit_adapter(case: MergeSpec, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = case.adapter.path / "adapter_model.safetensors"
    save_file({name: edit(name, tensor).contiguous() for name, tensor in load_file(file).items()}, file)


def edit_json(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def stored(store: Store, base: ModelSnapshot, work_folder: Path, key: str) -> ModelSnapshot:
    shutil.copytree(base.path, work_folder)
    return store.commit(base.model_copy(update={"path": work_folder}), "download", key)


def test_an_adapter_of_other_weights_of_the_same_shapes(make_case: MakeCase, tmp_path: Path) -> None:
    case, store = make_case(), Store(tmp_path / "store")
    trained_on = stored(store, case.base, tmp_path / "one", "1" * 64)
    weights = case.base.path / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    other = stored(store, case.base, tmp_path / "two", "2" * 64)
    adapter = case.adapter.model_copy(update={"base_digest": trained_on.digest})
    with pytest.raises(
        MergeError, match=f"digest {trained_on.digest[:12]} and not on test with digest {other.digest[:12]}"
    ):
        run(case.model_copy(update={"base": other, "adapter": adapter}))


def test_an_adapter_of_another_architecture(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    edit_adapter(case, lambda name, tensor: tensor[:, :16] if name.endswith("lora_A.weight") else tensor)
    with pytest.raises(MergeError, match=r"base is \[.*\] and the adapter's is \[.*\]; it was trained on another"):
        write_model(case, ignore)


def test_an_adapter_of_modules_that_the_base_lacks(make_case: MakeCase) -> None:
    case = make_case()
    file = case.adapter.path / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "qkv_proj"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(MergeError, match=r"qkv_proj\.weight, which the base does not have"):
        write_model(case, ignore)


def test_a_quantized_base(make_case: MakeCase) -> None:
    case = make_case()
    edit_json(case.base.path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(MergeError, match=r"quantized \(gptq\).*merge into the model that it was quantized from"):
        run(case)


def test_a_base_that_its_record_calls_quantized(make_case: MakeCase) -> None:
    case = make_case()
    base = case.base.model_copy(update={"quantization": "bnb-nf4"})
    with pytest.raises(MergeError, match=r"quantized \(bnb-nf4\)"):
        run(case.model_copy(update={"base": base}))


def test_a_missing_shard(make_case: MakeCase) -> None:
    case = make_case(shards="50KB")
    next(case.base.path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(MergeError, match=r"names model-00002-of-\d+\.safetensors, which is not there"):
        write_model(case, ignore)


def test_a_truncated_shard(make_case: MakeCase) -> None:
    case = make_case(shards="50KB")
    shard = next(case.base.path.glob("model-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(MergeError, match=r"model-00002-.* has [\d,]+ bytes and its header asks for [\d,]+; it is"):
        write_model(case, ignore)


def test_a_shard_whose_tensors_overlap(make_case: MakeCase) -> None:
    case = make_case()
    file = case.base.path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 128]
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(raw[:8] + text.ljust(length) + raw[8 + length :])
    with pytest.raises(MergeError, match=r"starts inside another tensor of .* or after a gap"):
        write_model(case, ignore)


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_disk_that_does_not_keep_what_it_was_given(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """One bit of one tensor, untouched or merged, is flipped on its way to the disk."""
    case, write = make_case(), Opened.write

    def flip_a_bit(files: Opened, place: StoredTensor, first_row: int, values: torch.Tensor) -> None:
        if place.name == tensor:
            values = values.clone()
            values.view(-1).view(torch.uint8)[5] ^= 1
        write(files, place, first_row, values)

    monkeypatch.setattr(Opened, "write", flip_a_bit)
    with pytest.raises(MergeError, match=rf"{tensor} does not stand in .* as it was written"):
        write_model(case, ignore)


def test_a_base_with_nan(make_case: MakeCase) -> None:
    case = make_case()
    weights = case.base.path / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(MergeError, match=r"model\.norm\.weight holds NaN or infinity in the base as well"):
        write_model(case, ignore)


def test_nan_in_the_adapter(make_case: MakeCase) -> None:
    case = make_case()
    edit_adapter(case, lambda name, tensor: tensor.fill_(float("nan")) if "0.mlp.up_proj.lora_A" in name else tensor)
    with pytest.raises(MergeError, match=r"layers\.0\.mlp\.up_proj\.lora_A\.weight of the adapter holds NaN"):
        write_model(case, ignore)


def test_an_adapter_that_changes_nothing(make_case: MakeCase) -> None:
    case = make_case()
    edit_adapter(case, lambda name, tensor: tensor.zero_() if "lora_B" in name else tensor)
    with pytest.raises(MergeError, match=r"every B of the adapter .* is zero"):
        write_model(case, ignore)


def test_an_adapter_whose_change_is_lost_in_rounding(make_case: MakeCase) -> None:
    case = make_case("llama", torch.bfloat16)
    edit_adapter(case, lambda name, tensor: tensor * 1e-9 if "lora_B" in name else tensor)
    with pytest.raises(MergeError, match="rounding swallowed every change"):
        write_model(case, ignore)


def test_a_wrong_rank_pattern(make_case: MakeCase) -> None:
    case = make_case()
    edit_json(case.adapter.path / "adapter_config.json", rank_pattern={"layers.1.self_attn.q_proj": 2})
    with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.q_proj has A \[4, 32\].* says rank 2"):
        write_model(case, ignore)


def prove(case: MergeSpec) -> Predictions:
    return prove_predictions(case, read_probe(case.dataset.path), torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_is_wrong_in_one_of_twelve_ways(make_case: MakeCase, kind: str, dtype: torch.dtype) -> None:
    case = make_case("llama", dtype)
    write_model(case, ignore)
    prove(case)
    assert make_wrong(case, kind)
    with pytest.raises(
        MergeError, match=r"(are not the base plus what PEFT adds|should be the base's|differs from the base's)"
    ):
        prove(case)


@pytest.mark.parametrize("stored", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("factor", [1e-3, 1.0, 30.0])
def test_a_right_merge_is_accepted_whatever_rounding_costs(
    make_case: MakeCase, factor: float, base: torch.dtype, stored: str
) -> None:
    """The hardest of these adapters changes weights so much that 16 bit lose most of what base + adapter predict."""
    case = make_case("llama", base, merge={"dtype": stored})
    edit_adapter(case, lambda name, tensor: tensor * factor if "lora_B" in name else tensor)
    merged = work(case.model_dump(mode="json"), ignore)
    assert merged.proof.prediction_difference <= merged.proof.prediction_limit < 1e-4


def test_a_head_that_is_another_when_the_folder_is_loaded(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is right, and yet the model is another: as a wrong tie in its class would make it."""
    case = make_case()

    def load_another_head(folder: Path, device: torch.device) -> PreTrainedModel:
        model = load_full(folder, device)
        if folder == case.into / "model":
            model.get_output_embeddings().weight.data.mul_(1.001)
        return model

    monkeypatch.setattr("qlora_core.merging.worker.load_full", load_another_head)
    with pytest.raises(MergeError, match=r"does not predict what its weights predict .*computing in float32 explains"):
        work(case.model_dump(mode="json"), ignore)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
    ids=lambda lora: next(iter(lora)),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_that_peft_can_change_is_proven(
    make_case: MakeCase, lora: dict[str, Any], dtype: torch.dtype
) -> None:
    case = make_case("qwen2" if "lora_bias" in lora or "bias" in lora else "llama", dtype, **lora)
    write_model(case, ignore)
    prove(case)
    weights = case.into / "model" / "model.safetensors"
    right = load_file(weights)
    base = load_file(case.base.path / "model.safetensors")
    changed = [name for name in right if not torch.equal(right[name], base[name])]
    assert changed
    for name in changed:
        wrong = right[name].clone()
        wrong.view(-1)[wrong.abs().argmax()] *= 1.05
        save_file({**right, name: wrong}, weights, {"format": "pt"})
        with pytest.raises(MergeError, match="proof of the merge"):
            prove(case)


def test_data_made_with_another_tokenizer(make_case: MakeCase) -> None:
    case = make_case()
    data = case.dataset.model_copy(update={"tokenizer_digest": "e" * 64})
    with pytest.raises(MergeError, match="the data was made with eeeeeeeeeeee"):
        work(case.model_copy(update={"dataset": data}).model_dump(mode="json"), ignore)


def test_a_vocabulary_larger_than_the_embedding(make_case: MakeCase) -> None:
    case = make_case()
    smaller = case.base.architecture.model_copy(update={"vocab": 100})
    base = case.base.model_copy(update={"architecture": smaller})
    with pytest.raises(MergeError, match=r"tokenizer has ids up to \d+ and the embedding has 100 rows"):
        work(case.model_copy(update={"base": base}).model_dump(mode="json"), ignore)


def test_a_resized_vocabulary(make_case: MakeCase) -> None:
    case = make_case(modules_to_save=["lm_head", "embed_tokens"])
    edit_adapter(case, lambda name, tensor: torch.cat([tensor, tensor[:8]]) if "lm_head" in name else tensor)
    with pytest.raises(MergeError, match=r"lm_head\.weight .*\[328, 32\]; its vocabulary was resized"):
        write_model(case, ignore)


def test_a_tied_head_trained_apart(make_case: MakeCase) -> None:
    case = make_case("smollm", modules_to_save=["embed_tokens"])
    with pytest.raises(MergeError, match=r"ties lm_head to model\.embed_tokens and the adapter changes only one"):
        write_model(case, ignore)


def test_a_feature_of_peft_that_cannot_be_merged(make_case: MakeCase) -> None:
    case = make_case(trainable_token_indices=[1, 5])
    with pytest.raises(MergeError, match=r"uses trainable_token_indices=\[1, 5\], which cannot be merged"):
        write_model(case, ignore)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow over 40 kB: to the writer it is a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_disk_space(make_case: MakeCase, request: pytest.FixtureRequest) -> None:
    case = make_case()
    request.getfixturevalue("small_disk")
    with pytest.raises(MergeError, match=r"needs [\d,]+ bytes and cannot have them.*free some space"):
        write_model(case, ignore)
    assert not (case.into / "model").exists()


def test_the_output_folder_of_another_merge(make_case: MakeCase) -> None:
    case = make_case()
    (case.into / "model").mkdir(parents=True)
    with pytest.raises(MergeError, match="holds the output of another merge"):
        run(case)
