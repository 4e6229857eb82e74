"""The merged tensors against PEFT's own merge."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_core.events import ignore
from qlora_core.merging.spec import MergeSpec
from qlora_core.merging.worker import write_model


def merged_by_peft(case: MergeSpec) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(case.base.path, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, case.adapter.path).merge_and_unload()
    return dict(merged.state_dict())


def merged_here(case: MergeSpec) -> dict[str, torch.Tensor]:
    write_model(case, ignore)
    files = (case.into / "model").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "smollm", "mistral", "qwen2", "qwen3"])
def test_fp32_equals_peft_to_1e_6(make_case: Callable[..., MergeSpec], family: str) -> None:
    case = make_case(family)
    expected, merged = merged_by_peft(case), merged_here(case)
    assert merged.keys() <= expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_the_fp32_merge_rounded_once(make_case: Callable[..., MergeSpec], dtype: torch.dtype) -> None:
    case = make_case("qwen2", dtype)
    expected, merged = merged_by_peft(case), merged_here(case)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        step = torch.finfo(dtype).eps * expected[name].abs() / 2 + 1e-6
        assert ((tensor.float() - expected[name]).abs() <= step).all()


def test_plain_transformers_ties_the_embeddings(make_case: Callable[..., MergeSpec], tmp_path: Path) -> None:
    case = make_case("smollm")
    write_model(case, ignore)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "into" / "model")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
