"""Quantized copies of tiny models: by GPTQModel itself, or round-to-nearest in the bytes that auto-gptq wrote."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
INT32_BITS = 32
CALIBRATE = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig
source, target, bits, group = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(source)
text = "Paint the door red. The door is red. " * 3
config = GPTQConfig(bits=bits, group_size=group, dataset=[text] * 2, tokenizer=tokenizer)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu", dtype=torch.float32)
model.config.quantization_config.dataset = None
model.save_pretrained(target)
tokenizer.save_pretrained(target)
"""


def quantize_with_gptqmodel(model: Path, into: Path, bits: int = 4) -> Path:
    """A calibrated GPTQ checkpoint; in a process of its own, which takes GPTQModel's logging along.

    Through optimum, since GPTQModel 7.6 called directly needs a third CPU core. Nearly all of the time are imports.
    """
    command = [sys.executable, "-c", CALIBRATE, str(model), str(into), str(bits), str(GROUP)]
    subprocess.run(command, check=True, capture_output=True, timeout=550)
    return into


def quantize_like_auto_gptq(model: Path, into: Path, bits: int = 4) -> Path:
    """Round-to-nearest weights in format v1: zero points stored minus one, settings in a file of their own."""
    shutil.copytree(model, into)
    tensors = load_file(into / "model.safetensors")
    (into / "model.safetensors").unlink()
    for name in [name for name in tensors if "_proj." in name and name.endswith(".weight")]:
        packed = pack_gptq(tensors.pop(name).float(), bits, GROUP)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in packed.items()}
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halves, into / f"gptq_model-{bits}bit-{GROUP}g.safetensors", metadata={"format": "pt"})
    settings = {"bits": bits, "group_size": GROUP, "damp_percent": 0.01, "desc_act": False, "static_groups": False}
    settings |= {"sym": True, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}
    (into / "quantize_config.json").write_text(json.dumps(settings))
    return into


def quantize_with_bitsandbytes(model: Path, into: Path, kind: str = "nf4") -> Path:
    """A checkpoint with 4-bit weights as bitsandbytes stores them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float16)
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float16)
    loaded.save_pretrained(into)
    AutoTokenizer.from_pretrained(model).save_pretrained(into)
    return into


def pack_gptq(weight: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """`[out, in]` to `qweight [in * bits / 32, out]`, `qzeros`, `scales [groups, out]` and `g_idx [in]`."""
    rows, columns = weight.shape
    levels, zero = 2**bits - 1, 2 ** (bits - 1)
    groups = weight.reshape(rows, columns // group, group)
    scales = (groups.abs().amax(-1) / (zero - 1)).clamp(min=1e-6).half()
    whole = (groups / scales.float()[..., None] + zero).round().clamp(0, levels).int().reshape(rows, columns)
    zeros = torch.full((columns // group, rows), zero - 1, dtype=torch.int32, device=weight.device)
    return {
        "qweight": _into_int32(whole.T.contiguous(), bits),
        "qzeros": _into_int32(zeros.T.contiguous(), bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // group,
        "bias": torch.zeros(rows, dtype=torch.float16),
    }


def _into_int32(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first dimension, the first value in the lowest bits."""
    per_word = INT32_BITS // bits
    words = values.reshape(values.shape[0] // per_word, per_word, *values.shape[1:]).to(torch.int64)
    shifts = (torch.arange(per_word, device=values.device) * bits).reshape(1, per_word, *[1] * (values.dim() - 1))
    packed = (words << shifts).sum(1) & (2**INT32_BITS - 1)
    return (packed - (packed >> (INT32_BITS - 1)) * 2**INT32_BITS).to(torch.int32)
