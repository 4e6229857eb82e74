"""Proving that two models are the same but for quantization."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_core.artifacts import ModelSnapshot
from qlora_core.errors import SourceError
from qlora_core.events import ignore
from qlora_core.hub.resolve import prove_twin
from qlora_core.hub.snapshot import build
from qlora_core.hub.twin_proof import prove

WEIGHTS = "model.safetensors"
BITS, GROUP = 4, 16
NORM = "model.layers.1.post_attention_layernorm.weight"


def snapshot(folder) -> ModelSnapshot:
    return build({"into": folder, "gguf": None, "source": folder.name, "revision": "r"}, ignore)


def compare(quantized, twin):
    return prove({"quantized": snapshot(quantized), "twin": snapshot(twin)}, ignore)


def change(folder, file, edit):
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))


def change_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def pack(tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights of all linear layers by what GPTQ checkpoints hold, in the format's own shapes."""
    for name in [name for name in tensors if "_proj." in name]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.qweight"] = torch.zeros(columns * BITS // 32, rows, dtype=torch.int32)
        tensors[f"{stem}.qzeros"] = torch.zeros(columns // GROUP, rows * BITS // 32, dtype=torch.int32)
        tensors[f"{stem}.scales"] = torch.ones(columns // GROUP, rows, dtype=torch.float16)
        tensors[f"{stem}.g_idx"] = torch.arange(columns, dtype=torch.int32) // GROUP
        tensors[f"{stem}.bias"] = torch.zeros(rows, dtype=torch.float16)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.half()


@pytest.fixture
def twin(model_folder):
    return model_folder


@pytest.fixture
def quantized(twin, tmp_path):
    folder = tmp_path / "tiny-GPTQ-Int4"
    shutil.copytree(twin, folder)
    change_tensors(folder, pack)
    settings = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP}
    change(folder, "config.json", lambda config: config.update(quantization_config=settings))
    return folder


def test_a_gptq_model_and_its_twin_agree(quantized, twin):
    proof = compare(quantized, twin)
    assert (proof.tensors, proof.quantized_tensors) == (20, 14)
    assert proof.compared_values > 0
    assert proof.largest_relative_difference < 0.001


def test_a_bitsandbytes_model_and_its_twin_agree(twin, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(twin, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(twin).save_pretrained(tmp_path / "nf4")
    proof = compare(tmp_path / "nf4", twin)
    assert (proof.tensors, proof.quantized_tensors) == (20, 14)


def test_a_checkpoint_that_says_its_bits_in_a_file_of_its_own_is_understood(quantized, twin):
    change(quantized, "config.json", lambda config: config.pop("quantization_config"))
    (quantized / "quantize_config.json").write_text(json.dumps({"bits": BITS, "group_size": GROUP}))
    assert compare(quantized, twin).quantized_tensors == 14


def test_a_layer_of_another_shape_is_named(quantized, twin):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(twin, lambda tensors: tensors.update({name: torch.zeros(50, 32)}))
    with pytest.raises(
        SourceError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \[50, 32\], not \[48, 32\]; set `merge_base`"
    ):
        compare(quantized, twin)


def test_a_missing_tensor_is_named(quantized, twin):
    change_tensors(twin, lambda tensors: tensors.pop(NORM))
    with pytest.raises(SourceError, match=rf"it has no tensor {NORM}"):
        compare(quantized, twin)


def test_an_extra_tensor_is_named(quantized, twin):
    change_tensors(twin, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)}))
    with pytest.raises(SourceError, match=r"it has a tensor model\.extra\.weight"):
        compare(quantized, twin)


def test_a_bias_that_is_not_zero_is_no_artefact_of_quantization(quantized, twin):
    bias = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(quantized, lambda tensors: tensors.update({bias: torch.ones(32)}))
    with pytest.raises(SourceError, match=rf"it has no tensor {bias}"):
        compare(quantized, twin)


def test_another_fine_tune_of_the_same_shape_is_refused(quantized, twin):
    change_tensors(twin, lambda tensors: tensors.update({NORM: tensors[NORM] * 1.1}))
    with pytest.raises(SourceError, match=rf"the values of {NORM} differ by 9%, so it is another model"):
        compare(quantized, twin)


def test_another_architecture_is_named(quantized, twin):
    change(
        twin, "config.json", lambda config: config.update(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    )
    with pytest.raises(SourceError, match=r"rope_parameters is .*5\.0"):
        compare(quantized, twin)


def test_another_vocabulary_is_named(quantized, twin):
    def rename(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["xyz"] = vocabulary.pop("abc")

    change(twin, "tokenizer.json", rename)
    with pytest.raises(SourceError, match=r"token \d+ is 'xyz', not 'abc'"):
        compare(quantized, twin)


def test_a_tokenizer_that_cuts_differently_is_named(quantized, twin):
    change(twin, "tokenizer.json", lambda tokenizer: tokenizer["pre_tokenizer"].update(add_prefix_space=True))
    with pytest.raises(SourceError, match=r"its tokenizer cuts text differently: 'Ġ', not 'T'"):
        compare(quantized, twin)


def test_another_stop_token_is_named(quantized, twin):
    change(twin, "tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>"))
    with pytest.raises(SourceError, match=r"eos_token is '<\|endoftext\|>', not '<\|im_end\|>'"):
        compare(quantized, twin)


def test_a_quantized_model_is_nobodys_twin(quantized):
    with pytest.raises(SourceError, match=r"it is quantized itself \(gptq-int4\)"):
        compare(quantized, quantized)


def test_the_proof_runs_in_a_child_process(quantized, twin, tmp_path, events):
    proof = prove_twin(snapshot(quantized), snapshot(twin), tmp_path / "child", events.append)
    assert proof.tensors == 20
    assert "is the unquantized twin" in events[-1].message
