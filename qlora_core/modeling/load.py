"""Load a causal language model from a folder: in full precision, or quantized on the way for QLoRA."""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig, PreTrainedModel

from qlora_core.artifacts import Architecture, ModelSnapshot
from qlora_core.errors import SourceError, refusing
from qlora_core.modeling.bases import GPTQ_BACKEND, require_kernels
from qlora_core.modeling.context import context_tokens
from qlora_core.modeling.device import compute_dtype
from qlora_core.modeling.lora import IN_BLOCK
from qlora_core.modeling.remote_code import may_run_code, needs_code
from qlora_core.recipe import Quantization

BNB_STATE = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$")
GPTQ_STATE = ("qzeros", "scales", "g_idx")


def load_full(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in `dtype`, by default what the device computes in, ready for inference."""
    return _load(path, device, dtype or compute_dtype(device))


def load_base(
    snapshot: ModelSnapshot, device: torch.device, quantization: Quantization, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model as adapters are trained on it: linear layers in 4 or 8 bits, the rest in the compute dtype, frozen.

    Nothing is upcast: norms, embeddings and head stay in `dtype`, which trains as well as the fp32 copies
    that `peft.prepare_model_for_kbit_training` makes and needs far less memory.

    Args:
        snapshot: any row of `bases.TRAINABLE`.
        device: where to.
        quantization: how a base in full precision is quantized while loading; one that is quantized already stays as
            it is stored.
        dtype: of matrix products and of what is not quantized; by default what the device computes in.

    Raises:
        SourceError: adapters cannot be trained on it, or its kernels are not installed.
    """
    require_kernels(snapshot.quantization, snapshot.source)
    dtype = dtype or compute_dtype(device)
    options = _quantizing(snapshot.quantization, quantization, dtype)
    model = _load(snapshot.path, device, dtype, **options)
    for module in model.modules():
        _make_trainable(module, dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _make_trainable(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Undo what a layer remembers of the machine that stored it, or would decide by its first forward pass."""
    if isinstance(module, Linear4bit):
        module.compute_dtype = dtype
        module.compute_type_is_set = True
        # where a CPU has AVX512-BF16, a first pass without gradients repacks the weight for good: no gradient passes it
        # any more, products are rounded to bfloat16, and nobody else can read it
        module.support_avx512bf16_for_cpu = False
    if hasattr(module, "linear_mode"):
        # GPTQModel's CPU kernel stays without gradients for good when its first pass is one without
        module.linear_mode = "train"  # type: ignore[assignment]


def kernel_of(model: torch.nn.Module) -> str:
    """Class name of the quantized linear layers, for the log: `Linear4bit`, `TritonV2Linear`."""
    modules = [module for name, module in model.named_modules() if IN_BLOCK.search(name)]
    names = [type(module).__name__ for module in modules if not hasattr(module, "lora_A")]
    return next((name for name in names if "Linear" in name and name != "Linear"), "Linear")


def _quantizing(stored: str | None, wanted: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` has to be told about the quantization of a base."""
    if stored is None:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=wanted.kind,
            bnb_4bit_use_double_quant=wanted.double,
            bnb_4bit_compute_dtype=dtype,
        )
        return {"quantization_config": config}
    if stored.startswith("gptq-int"):
        bits = int(stored.removeprefix("gptq-int"))
        return {"quantization_config": GPTQConfig(bits=bits, backend=GPTQ_BACKEND)}
    return {}


def read_architecture(path: Path) -> Architecture:
    """Architecture facts from `config.json`, and the parameter count from the safetensors headers.

    Raises:
        SourceError: the folder holds no causal language model that transformers knows.
    """
    try:
        with refusing(SourceError, f"the model folder {path}"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=may_run_code(path))
            return Architecture(
                model_type=config.model_type,
                layers=config.num_hidden_layers,
                hidden=config.hidden_size,
                intermediate=config.intermediate_size,
                heads=config.num_attention_heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
                head_dim=getattr(config, "head_dim", None),
                vocab=config.vocab_size,
                context_tokens=context_tokens(config),
                parameters=count_parameters(path),
                tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
            )
    except SourceError as error:
        raise SourceError(f"{error}{needs_code(path)}") from error.__cause__


def count_parameters(path: Path) -> int:
    """Parameters of the model in a folder, as many as it has unquantized, from the headers of its safetensors files."""
    from safetensors import safe_open

    total = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            headers = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
            packed = {name for name, header in headers.items() if header.get_dtype() == "U8"}
        total += sum(_parameters_of(name, shapes, name in packed) for name in shapes)
    return total


def _parameters_of(name: str, shapes: Mapping[str, tuple[int, ...]], packed: bool) -> int:
    """Of one tensor: words and bytes hold several, and what a quantizer needs beside them is none."""
    stem, _, kind = name.rpartition(".")
    if BNB_STATE.search(name) or (kind in GPTQ_STATE and f"{stem}.qweight" in shapes):
        return 0
    if kind == "qweight" and f"{stem}.g_idx" in shapes:
        return shapes[f"{stem}.g_idx"][0] * shapes[name][1]
    return prod(shapes[name]) * (2 if packed else 1)


def _load(path: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        trust_remote_code=may_run_code(path),
        use_safetensors=True,
        **options,
    )
    return model.eval()
