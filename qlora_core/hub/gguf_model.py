"""Turn a GGUF file into a plain transformers folder: dequantized safetensors, tokenizer, chat template."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedModel

from qlora_core.errors import SourceError
from qlora_core.events import Note, Report
from qlora_core.hub.disk import require_space
from qlora_core.hub.gguf_header import GgufHeader, read_header
from qlora_core.hub.gguf_tokenizer import read_tokenizer
from qlora_core.store import write_atomically

STORAGE = torch.bfloat16
"""Half the size of fp32 at the same perplexity: a GGUF file holds far less precision."""
MAX_SHARD = "2GB"
END_OF_TURN_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def convert(gguf: Path, into: Path, report: Report) -> None:
    """Write the model of a GGUF file into the folder `into`.

    Raises:
        SourceError: the file is damaged or of an architecture that transformers cannot read.
    """
    report(Note(message=f"reading the header of {gguf.name}"))
    header = read_header(gguf)
    _check(gguf, header)
    tokenizer = read_tokenizer(gguf, header.metadata, _of_architecture(header, "context_length"))
    require_space(into, _elements(header) * STORAGE.itemsize, f"converting {gguf.name}")
    report(Note(message=f"dequantizing {len(header.shapes)} tensors, {_elements(header) / 1e6:.1f}M weights"))
    model = _load(gguf)
    _set_special_tokens(model, header.metadata)
    report(Note(message=f"writing safetensors in {str(STORAGE).removeprefix('torch.')}"))
    model.save_pretrained(into, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(into)
    _edit(into / "config.json", remove="_model_name_or_path")
    _edit(into / "tokenizer_config.json", remove="backend", tokenizer_class="PreTrainedTokenizerFast")
    write_atomically(into / "README.md", _card(gguf.name, header.metadata))


def _card(name: str, metadata: dict[str, Any]) -> str:
    """A model card with the licence that the file declares, which whatever is made from the model must keep."""
    declared = str(metadata.get("general.license", ""))
    licence = f"license: {declared}\n" if re.fullmatch(r"[\w.-]+", declared) else ""
    stored = str(STORAGE).removeprefix("torch.")
    return (
        f"---\n{licence}library_name: transformers\n---\n\n# {name}\n\nDequantized to {stored} from this GGUF file.\n"
    )


def _check(gguf: Path, header: GgufHeader) -> None:
    """What transformers would believe without looking: the sizes it builds the model from."""
    if header.metadata.get("split.count", 0) > 1:
        raise SourceError(
            f"{gguf.name} is one of {header.metadata['split.count']} parts; join them with llama-gguf-split"
        )
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_id"):
        if key not in header.metadata:
            raise SourceError(f"{gguf.name} holds no {key}; use the model's own safetensors folder instead")
    embedding = header.shapes.get("token_embd.weight", ())
    claimed = (_of_architecture(header, "embedding_length"), len(header.metadata["tokenizer.ggml.tokens"]))
    if embedding != claimed:
        raise SourceError(f"{gguf.name} claims embeddings of {claimed} but holds {embedding}; the file is damaged")
    if _of_architecture(header, "block_count") > len(header.shapes):
        raise SourceError(f"{gguf.name} claims more layers than it has tensors; the file is damaged")


def _of_architecture(header: GgufHeader, key: str) -> int:
    name = header.metadata.get("general.architecture", "")
    value = header.metadata.get(f"{name}.{key}")
    if not isinstance(value, int) or not 0 < value <= sys.maxsize:
        raise SourceError(f"the GGUF file says {value!r} for {name}.{key}; a positive number is needed")
    return value


def _elements(header: GgufHeader) -> int:
    total = 0
    for shape in header.shapes.values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total


def _load(gguf: Path) -> PreTrainedModel:
    """The dequantized model; `dequantize=True` is also what lets transformers save it again."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=STORAGE,
            output_loading_info=True,
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(f"transformers cannot read {gguf.name}: {error}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise SourceError(f"{gguf.name} has no weights for {', '.join(missing[:5])}; the file is not whole")
    return model


def _set_special_tokens(model: PreTrainedModel, metadata: dict[str, Any]) -> None:
    """Generation stops at every token that the file calls an end."""
    ends = sorted({metadata[key] for key in END_OF_TURN_KEYS if key in metadata})
    pad = metadata.get("tokenizer.ggml.padding_token_id", metadata["tokenizer.ggml.eos_token_id"])
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=ends[0] if len(ends) == 1 else ends, pad_token_id=pad
    )


def _edit(file: Path, remove: str, **values: str) -> None:
    """Change a JSON file: transformers 4 cannot load the class that transformers 5 names for any fast tokenizer."""
    content = json.loads(file.read_text())
    content.pop(remove, None)
    write_atomically(file, json.dumps({**content, **values}, indent=2, ensure_ascii=False) + "\n")
