"""A quantized checkpoint has as many parameters as what it was made from."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora_core.modeling.load import count_parameters
from tests.quantized import quantize_like_auto_gptq

BLOCKS, HIDDEN, WIDE = 2, 64, 128


@pytest.fixture
def model(tmp_path):
    config = LlamaConfig(
        vocab_size=100, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=BLOCKS, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def elements(model) -> int:
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())


def test_full_precision(model):
    assert count_parameters(model) == elements(model)


@pytest.mark.parametrize("double", [False, True])
def test_nf4(model, double, tmp_path):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4, dtype=torch.float16)
    loaded.save_pretrained(tmp_path / "nf4")
    assert count_parameters(tmp_path / "nf4") == elements(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(model, bits, tmp_path):
    biases = BLOCKS * (5 * HIDDEN + 2 * WIDE)  # auto-gptq gave one to every linear
    assert count_parameters(quantize_like_auto_gptq(model, tmp_path / "gptq", bits)) == elements(model) + biases
