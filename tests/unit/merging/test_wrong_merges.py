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
from qlora_core.events import Note, ignore
from qlora_core.merging.blocks import Opened
from qlora_core.merging.deltas import check_deltas
from qlora_core.merging.logits import LIMITS, Agreement, Limits, agree, check, predict, read_probe, with_adapter
from qlora_core.merging.merge import merge
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.tensors import StoredTensor, read_folder
from qlora_core.merging.worker import work, write_model
from qlora_core.modeling.load import load_full
from qlora_core.store import Store

MakeCase = Callable[..., MergeSpec]


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


def test_an_adapter_added_at_half_its_scale(make_case: MakeCase) -> None:
    """Nothing but the comparison of predictions can see this one."""
    case = make_case()
    write_model(case, ignore)
    weights = case.into / "model" / "model.safetensors"
    base, merged = load_file(case.base.path / "model.safetensors"), load_file(weights)
    save_file({name: (base[name] + merged[name]) / 2 for name in merged}, weights, {"format": "pt"})
    cpu, probe = torch.device("cpu"), read_probe(case.dataset.path)
    expected = predict(with_adapter(load_full(case.base.path, cpu), case.adapter.path), probe)
    agreement = agree(expected, predict(load_full(case.into / "model", cpu), probe))
    with pytest.raises(MergeError, match=r"does not predict what base \+ adapter predict in float32: .*KL"):
        check(agreement, torch.float32, cpu)


def test_a_difference_that_peft_shows_too_is_no_fault_of_the_merge() -> None:
    """Figures of an adapter that was trained hard: fp32 sums of another order alone make this difference."""
    cpu, by_peft = torch.device("cpu"), Agreement(1e-3, 8e-4, 0.0, 1.0)
    with pytest.raises(MergeError, match=r"largest logit difference over largest logit 0\.0008 \(at most 0\.0001\)"):
        check(by_peft, torch.float32, cpu)
    check(by_peft, torch.float32, cpu, by_peft)
    with pytest.raises(MergeError, match=r"0\.0017 \(at most 0\.0016\)"):
        check(by_peft._replace(largest_share=1.7e-3), torch.float32, cpu, by_peft)
    lost = Agreement(1.0, 0.3, 0.1, 0.8)
    with pytest.raises(MergeError, match=r"in bfloat16: .*0\.3 \(at most 0\.2\)"):
        check(lost, torch.bfloat16, cpu, lost)


def test_what_a_hard_trained_adapter_predicts_is_held_against_peft(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With limits that no merge holds, PEFT's own merge is the measure: a right merge passes, a wrong one does not."""
    monkeypatch.setitem(LIMITS, torch.float32, Limits(0.0, 0.0, 1.0))
    case, heard = make_case(), []
    work(case.model_dump(mode="json"), heard.append)
    assert any("holding it against what PEFT merges" in event.message for event in heard if isinstance(event, Note))

    def load_another_head(folder: Path, device: torch.device) -> PreTrainedModel:
        model = load_full(folder, device)
        if folder == case.into / "model":
            model.get_output_embeddings().weight.data.mul_(1.001)
        return model

    monkeypatch.setattr("qlora_core.merging.worker.load_full", load_another_head)
    with pytest.raises(MergeError, match="does not predict what base"):
        work(case.model_dump(mode="json"), ignore)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_added_at_nine_tenths_of_its_scale(make_case: MakeCase, dtype: torch.dtype) -> None:
    """In bf16 the predictions hardly show it; the weights do."""
    case = make_case("llama", dtype)
    write_model(case, ignore)
    adapted = with_adapter(load_full(case.base.path, torch.device("cpu")), case.adapter.path)
    base, model = read_folder(case.base.path), case.into / "model"
    check_deltas(adapted, base, read_folder(model))
    weights, before = load_file(model / "model.safetensors"), load_file(case.base.path / "model.safetensors")
    short = {name: (before[name].float() + 0.9 * (weights[name].float() - before[name].float())) for name in weights}
    save_file({name: tensor.to(dtype) for name, tensor in short.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"is not the base plus what PEFT adds, rounded once"):
        check_deltas(adapted, base, read_folder(model))


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
