"""The merged tensors against PEFT's own merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from qlora_core.events import ignore
from qlora_core.merging.adapter import read_changes
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.tensors import lay_out, read_folder
from qlora_core.merging.worker import write_model
from qlora_core.merging.write import write_shards

FAMILIES = ["llama", "smollm", "mistral", "qwen2", "qwen3"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3, "k_proj": 5}},
    "head and embedding whole": {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "norms whole": {"modules_to_save": ["input_layernorm"]},
}
EMBEDDING_BY_LORA = {"target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True}
UNTIED = ["llama", "mistral", "qwen3"]
BIAS_VARIANTS: dict[str, dict[str, Any]] = {
    "biases of the adapted modules": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj"]},
    "LoRA on biases": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
}
CASES = [
    *[pytest.param(family, lora, id=f"{family}-{name}") for family in FAMILIES for name, lora in VARIANTS.items()],
    *[pytest.param(family, EMBEDDING_BY_LORA, id=f"{family}-embedding by LoRA") for family in UNTIED],
    *[pytest.param("qwen2", lora, id=f"qwen2-{name}") for name, lora in BIAS_VARIANTS.items()],
]


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_fp32_equals_peft_to_1e_6(make_case: Callable[..., MergeSpec], family: str, lora: dict[str, Any]) -> None:
    case = make_case(family, **lora)
    write_model(case, ignore)
    merged, expected = read(case.into / "model"), merged_by_peft(case.base.path, case.adapter.path)
    assert merged.keys() <= expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_is_the_fp32_merge_rounded_once(
    make_case: Callable[..., MergeSpec], family: str, dtype: torch.dtype
) -> None:
    case = make_case(family, dtype)
    write_model(case, ignore)
    merged, expected = read(case.into / "model"), merged_by_peft(case.base.path, case.adapter.path)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2 * expected[name].abs() + 1e-6
        assert ((tensor.float() - expected[name]).abs() <= half_a_step).all()


def test_fan_in_fan_out_weights_equal_peft(tmp_path: Path, save_adapter: Callable[..., object]) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    save_adapter(model, tmp_path / "adapter", lora)
    base = read_folder(tmp_path / "base")
    (tmp_path / "model").mkdir()
    shards = lay_out(base.values(), None, 10**9, tmp_path / "model")
    write_shards(shards, base, read_changes(tmp_path / "adapter", base, tied=False), processes=1, report=ignore)
    expected = merged_by_peft(tmp_path / "base", tmp_path / "adapter")
    for name, tensor in read(tmp_path / "model").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_a_wider_dtype_than_the_base_is_written_when_asked(make_case: Callable[..., MergeSpec]) -> None:
    case = make_case("llama", torch.bfloat16, merge={"dtype": "float32"})
    write_model(case, ignore)
    merged, expected = read(case.into / "model"), merged_by_peft(case.base.path, case.adapter.path)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["smollm", "qwen2"])
def test_lora_on_a_tied_embedding_is_added_once(make_case: Callable[..., MergeSpec], family: str) -> None:
    """PEFT 0.21 adds it twice, once for the embedding and once for the head; its forward pass is the reference."""
    case = make_case(family, **EMBEDDING_BY_LORA)
    write_model(case, ignore)
    ids = torch.arange(10, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(case.base.path)
    merged = AutoModelForCausalLM.from_pretrained(case.into / "model")
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(base, case.adapter.path).eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_plain_transformers_ties_the_embeddings(make_case: Callable[..., MergeSpec], tmp_path: Path) -> None:
    case = make_case("smollm")
    write_model(case, ignore)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "into" / "model")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
