"""Prove that an unquantized model is the one that a quantized model was made from, before anything is trained.

What must agree: the architecture, every tensor's name and shape, the values of what quantization leaves alone (norms
and embeddings, which tell apart two fine-tunes of one shape), and the tokenizer.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedTokenizerFast

from qlora_core.artifacts import ModelSnapshot, TwinProof
from qlora_core.errors import SourceError
from qlora_core.events import Note, Report
from qlora_core.hub.snapshot import TwinSpec
from qlora_core.modeling.remote_code import may_run_code
from qlora_core.modeling.tokenizer import load_tokenizer

WHAT_TO_DO = "set `merge_base` to the unquantized model that it was made from"
SAME_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
    "rope_parameters",
)
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
BNB_STATE = ".quant_state.bitsandbytes__"
BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
INT8_PARTS = ("SCB", "weight_format")
NOT_TRAINED = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
VALUE_TOLERANCE = 0.02
"""Relative difference of norms; bf16 and fp16 copies of one tensor differ by less than 1 %."""
PROBE_ROWS = 64
PROBE_TEXT = "The 12 quick brown foxes' jump, naïve: 1984! \n\t你好 世界 🦊 def f(x): return x**2"


def prove(spec: dict[str, Any], report: Report) -> TwinProof:
    """Compare two model folders.

    Raises:
        SourceError: they differ; the message names the first field, tensor or token that does.
    """
    asked = TwinSpec.model_validate(spec)
    quantized, twin = asked.quantized.path, asked.twin.path
    if asked.twin.quantization is not None:
        raise _mismatch(asked, f"it is quantized itself ({asked.twin.quantization})")
    _same_architecture(asked)
    with ExitStack() as stack:
        left, right = _Tensors(quantized, stack), _Tensors(twin, stack)
        tied = asked.twin.architecture.tied_embeddings
        layers = _same_shapes(asked, left, right, tied)
        compared, largest = _same_values(asked, left, right, layers)
    tokens = _same_tokenizer(asked, load_tokenizer(quantized), load_tokenizer(twin))
    report(Note(message=f"{asked.twin.source} is the unquantized twin: {len(right)} tensors, {tokens:,} tokens agree"))
    return TwinProof(
        path=twin,
        quantized_digest=asked.quantized.digest,
        twin_digest=asked.twin.digest,
        tensors=len(right),
        quantized_tensors=len(layers),
        compared_values=compared,
        largest_relative_difference=largest,
        tokens=tokens,
    )


def _mismatch(asked: TwinSpec, what: str) -> SourceError:
    twin, quantized = asked.twin.source, asked.quantized.source
    return SourceError(f"{twin} is not the unquantized twin of {quantized}: {what}; {WHAT_TO_DO}")


def _same_architecture(asked: TwinSpec) -> None:
    left, right = (
        AutoConfig.from_pretrained(snapshot.path, trust_remote_code=may_run_code(snapshot.path))
        for snapshot in (asked.quantized, asked.twin)
    )
    for key in SAME_ARCHITECTURE:
        here, there = getattr(left, key, None), getattr(right, key, None)
        if here != there:
            raise _mismatch(asked, f"{key} is {there}, not {here}")


class _Tensors(Mapping[str, Any]):
    """The tensors of a folder by name, read only where asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Any:
        return self._files[name].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored."""
        return tuple(self[name].get_shape())


def _same_shapes(asked: TwinSpec, left: _Tensors, right: _Tensors, tied: bool) -> set[str]:
    """Names of the weights that are quantized, once every tensor has its counterpart of the same shape."""
    shapes, layers = unpacked_shapes(left, _bits(asked.quantized))
    theirs = {name: right.shape(name) for name in right if not name.endswith(NOT_TRAINED)}
    optional = {"lm_head.weight"} if tied else set()
    for name, shape in sorted(shapes.items()):
        if name not in theirs:
            if name in optional or _is_zero_bias(left, name):
                continue
            raise _mismatch(asked, f"it has no tensor {name}, which the quantized model has")
        if theirs[name] != shape:
            raise _mismatch(asked, f"{name} has shape {list(theirs[name])}, not {list(shape)}")
    missing = sorted(set(theirs) - set(shapes) - optional)
    if missing:
        raise _mismatch(asked, f"it has a tensor {missing[0]}, which the quantized model has not")
    return layers


def unpacked_shapes(tensors: _Tensors, bits: int) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes that a quantized folder's tensors have when unpacked, by their unquantized names, and which are packed.

    GPTQ packs a weight `[out, in]` into `qweight [in * bits / 32, out]`; bitsandbytes keeps the shape in a JSON beside
    the packed bytes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    packed: set[str] = set()
    for name in tensors:
        stem, _, part = name.rpartition(".")
        if name.endswith(NOT_TRAINED) or part in BNB_PARTS + INT8_PARTS or BNB_STATE in name:
            continue
        if part == "qweight":
            rows, columns = tensors.shape(name)
            shapes[f"{stem}.weight"] = (columns, rows * 32 // bits)
            packed.add(f"{stem}.weight")
        elif part not in GPTQ_PARTS:
            shapes[name] = tensors.shape(name)
    for name in tensors:
        if BNB_STATE in name:
            weight = name.partition(BNB_STATE)[0]
            shapes[weight] = tuple(json.loads(bytes(tensors[name][:].tolist()))["shape"])
            packed.add(weight)
        elif name.endswith(".SCB"):
            packed.add(f"{name.removesuffix('.SCB')}.weight")
    return shapes, packed


def _bits(snapshot: ModelSnapshot) -> int:
    kind = snapshot.quantization or ""
    if kind.startswith("gptq-int"):
        return int(kind.removeprefix("gptq-int"))
    if kind.startswith("bnb-"):
        return 8 if kind == "bnb-int8" else 4
    raise SourceError(
        f"{snapshot.source} is quantized as {kind or 'nothing'}; adapters can be trained on gptq-int4, gptq-int8, "
        "bnb-nf4, bnb-fp4, bnb-int8 and on full precision"
    )


def _is_zero_bias(tensors: _Tensors, name: str) -> bool:
    """GPTQ writers give every packed layer a bias, zero where the model has none."""
    return name.endswith(".bias") and not bool(tensors[name][:].any())


def _same_values(asked: TwinSpec, left: _Tensors, right: _Tensors, layers: set[str]) -> tuple[int, float]:
    """Compare what quantization leaves alone: all vectors, and the first rows of unpacked matrices."""
    compared, largest = 0, 0.0
    for name in sorted(set(left) & set(right) - layers):
        here, there = left[name][:PROBE_ROWS].float(), right[name][:PROBE_ROWS].float()
        difference = float(torch.linalg.vector_norm(here - there) / torch.linalg.vector_norm(there).clamp(min=1e-12))
        if difference > VALUE_TOLERANCE:
            raise _mismatch(asked, f"the values of {name} differ by {difference:.0%}, so it is another model")
        compared, largest = compared + here.numel(), max(largest, difference)
    return compared, largest


def _same_tokenizer(asked: TwinSpec, left: PreTrainedTokenizerFast, right: PreTrainedTokenizerFast) -> int:
    here, there = (tokenizer.get_vocab() for tokenizer in (left, right))
    if here != there:
        names = {number: token for token, number in there.items()}
        number, token = min((number, token) for token, number in (here.items() - there.items()) or there.items())
        raise _mismatch(asked, f"token {number} is {names.get(number)!r}, not {token!r}")
    for role in ("eos_token", "bos_token"):
        if getattr(left, role) != getattr(right, role):
            raise _mismatch(asked, f"{role} is {getattr(right, role)!r}, not {getattr(left, role)!r}")
    ours, theirs = (tokenizer.tokenize(PROBE_TEXT) for tokenizer in (left, right))
    if ours != theirs:
        first = next(pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1])
        raise _mismatch(asked, f"its tokenizer cuts text differently: {first[0]!r}, not {first[1]!r}")
    return len(here)
