"""The table of base models: what can train, with which kernels, and what its adapters are merged into.

A base's kind is `ModelSnapshot.quantization`: None for full precision, else `method-format`, as `quantization_of` reads
it from a `config.json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_core.errors import SourceError


class BaseKind(NamedTuple):
    """One row of the table."""

    held_as: str
    """In memory while training."""
    kernels: str
    merges_into: str
    needs: str | None = None
    """Package that has to be installed, as its import is called."""
    extra: str | None = None
    """Extra of this distribution that brings it."""


_SELF, _TWIN = "the same model", "its unquantized twin"

TRAINABLE: Mapping[str | None, BaseKind] = {
    None: BaseKind("NF4 or FP4, quantized while loading", "bitsandbytes", _SELF),
    "bnb-nf4": BaseKind("NF4 as stored", "bitsandbytes", _TWIN),
    "bnb-fp4": BaseKind("FP4 as stored", "bitsandbytes", _TWIN),
    "gptq-int4": BaseKind("Int4 as stored", "GPTQModel: Triton on a GPU, ATen on a CPU", _TWIN, "gptqmodel", "gptq"),
    "gptq-int8": BaseKind("Int8 as stored", "GPTQModel: Triton on a GPU, torch on a CPU", _TWIN, "gptqmodel", "gptq"),
}
"""Every kind that adapters are trained on."""

REFUSED: Mapping[str, str] = {
    "bnb-int8": "its matrix products round activations to 8 bits, which costs accuracy that NF4 does not",
    "awq": "its kernels are made for inference and give no gradient that this project has proven",
    "aqlm": "its codebooks have no trainable kernel on every device",
    "eetq": "its kernels are made for inference",
    "hqq": "no merge of it has been proven here",
    "fp8": "its kernels give no gradient to adapters",
    "compressed-tensors": "its kernels are made for inference",
    "mxfp4": "its kernels are made for inference",
}
"""Kinds, or the beginnings of kinds, that are known and refused, with why."""

GPTQ_BACKEND = "auto_trainable"
"""GPTQModel's fastest kernels that have a backward pass; the exllama and Marlin kernels have none."""


def kind_of_base(quantization: str | None, source: str) -> BaseKind:
    """The row of a base.

    Args:
        quantization: its kind.
        source: what to call it in an error.

    Raises:
        SourceError: adapters cannot be trained on it; the message says why and what to take.
    """
    if quantization in TRAINABLE:
        return TRAINABLE[quantization]
    why = next((why for name, why in REFUSED.items() if str(quantization).startswith(name)), "it is not known here")
    allowed = ", ".join(kind for kind in TRAINABLE if kind)
    raise SourceError(
        f"{source} is quantized as {quantization}, on which adapters cannot be trained: {why}. Set `model` to a model "
        f"in full precision, which is quantized while loading, or to one of {allowed}"
    )


def require_kernels(quantization: str | None, source: str) -> None:
    """Refuse a base whose kernels are not installed, before anything is computed.

    Raises:
        SourceError: it cannot train, or a package is missing; the message says what to install.
    """
    from importlib.util import find_spec

    kind = kind_of_base(quantization, source)
    missing = [name for name in (kind.needs, kind.needs and "optimum") if name and find_spec(name) is None]
    if missing:
        raise SourceError(
            f"{source} is quantized as {quantization} and needs {' and '.join(missing)}, which is not installed; "
            f"install it with: pip install 'qlora-flows[{kind.extra}]'"
        )


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """How the weights of a `config.json` are stored: `gptq-int4`, `bnb-nf4`, ..., or None for full precision."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method", "unknown")
    if method == "bitsandbytes":
        is_4bit = quantization.get("load_in_4bit")
        return f"bnb-{quantization.get('bnb_4bit_quant_type', 'fp4')}" if is_4bit else "bnb-int8"
    return f"{method}-int{quantization['bits']}" if "bits" in quantization else str(method)


def adopt_auto_gptq(folder: Path) -> None:
    """Turn a checkpoint in the form that auto-gptq wrote into one that transformers loads, in place.

    That form (format v1) keeps its settings in `quantize_config.json` and its weights in
    `gptq_model-4bit-128g.safetensors`; now the settings stand in `config.json` and the weights in
    `model.safetensors`. A folder in another form is left as it is.
    """
    import json

    settings, config = folder / "quantize_config.json", folder / "config.json"
    if settings.is_file():
        content, quantization = json.loads(config.read_text()), json.loads(settings.read_text())
        if not content.get("quantization_config"):
            quantization = {"checkpoint_format": "gptq", **quantization, "quant_method": "gptq"}
            config.unlink()  # it may share its bytes with the downloads
            config.write_text(json.dumps({**content, "quantization_config": quantization}, indent=2) + "\n")
    whole = sorted(folder.glob("gptq_model*.safetensors"))
    index = sorted(folder.glob("gptq_model*.safetensors.index.json"))
    if index:
        index[0].rename(folder / "model.safetensors.index.json")
    elif len(whole) == 1:
        whole[0].rename(folder / "model.safetensors")
