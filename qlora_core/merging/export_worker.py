"""The exporting child process: quantize, save, load again as a server would, and measure."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig, PreTrainedModel

from qlora_core.artifacts import ExportedModel
from qlora_core.errors import MergeError
from qlora_core.events import Note, Report
from qlora_core.merging.card import CARD, note_export
from qlora_core.merging.export import ExportSpec
from qlora_core.merging.logits import agree, mean_loss, predict, read_probe
from qlora_core.merging.spec import MODEL
from qlora_core.modeling.device import compute_dtype, pick_device
from qlora_core.modeling.load import load_full
from qlora_core.modeling.rows import TokenRows
from qlora_core.modeling.tokenizer import load_tokenizer
from qlora_core.store import discard

CALIBRATION_ROWS = 128
GROUP_SIZES = (128, 64, 32, 16)


def work(spec: dict[str, Any], report: Report) -> ExportedModel:
    """Export, measure, and say so on the card; the child's entry.

    Raises:
        MergeError: the quantizer is not installed or cannot take this model.
    """
    task = ExportSpec.model_validate(spec)
    merged, exported, device = task.model, task.into / MODEL, pick_device()
    probe = read_probe(task.dataset.path)
    expected = predict(load_full(merged, device), probe)
    discard(exported)
    exported.mkdir(parents=True)
    report(Note(message=f"quantizing to {task.kind}"))
    if task.kind == "nf4":
        _save_nf4(merged, exported, device)
    else:
        _save_gptq(merged, exported, device, task.dataset.path)
    _copy_what_serving_needs(merged, exported)
    found = predict(_load(exported, device), probe)
    agreement = agree(expected, found)
    made = ExportedModel(
        path=task.into,
        kind=task.kind,
        model_digest=task.model_digest,
        bytes=sum(file.stat().st_size for file in exported.glob("*.safetensors")),
        losses={"merged": mean_loss(expected, probe), "exported": mean_loss(found, probe)},
        kl_divergence=agreement.kl,
        top1_agreement=agreement.top1,
        probe_tokens=sum(len(row.input_ids) for row in probe),
    )
    note_export(exported / CARD, made)
    return made


def _save_nf4(merged: Path, exported: Path, device: torch.device) -> None:
    """Quantize while loading; what stays unquantized keeps the merged model's dtype."""
    dtype = AutoConfig.from_pretrained(merged).dtype or torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        merged, dtype=dtype, device_map={"": device}, quantization_config=config
    )
    model.save_pretrained(exported)


def _save_gptq(merged: Path, exported: Path, device: torch.device, dataset: Path) -> None:
    """Calibrate on training rows; their text must not travel with the model, so it is taken out of its config."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise MergeError("gptq-int4 needs GPTQModel, which is not installed; pip install 'qlora-flows[gptq]'")
    tokenizer, rows = load_tokenizer(merged), TokenRows(dataset / "train.arrow")
    texts = [tokenizer.decode(rows[index].input_ids) for index in range(min(len(rows), CALIBRATION_ROWS))]
    config = GPTQConfig(bits=4, group_size=_group_size(merged), dataset=texts, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        merged, dtype=compute_dtype(device), device_map={"": device}, quantization_config=config
    )
    model.config.quantization_config.dataset = None
    model.save_pretrained(exported)


def _group_size(merged: Path) -> int:
    """The largest group that divides the inputs of every linear layer.

    Raises:
        MergeError: none does.
    """
    config = AutoConfig.from_pretrained(merged)
    for size in GROUP_SIZES:
        if config.hidden_size % size == 0 and config.intermediate_size % size == 0:
            return size
    raise MergeError(
        f"gptq-int4 needs layers whose inputs are a multiple of one of {GROUP_SIZES}; this model has "
        f"{config.hidden_size} and {config.intermediate_size}, export it as nf4"
    )


def _load(exported: Path, device: torch.device) -> PreTrainedModel:
    dtype = compute_dtype(device)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(exported, dtype=dtype, device_map={"": device})
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # bitsandbytes takes it from the folder, where it is what a GPU computes in
    return model.eval()


def _copy_what_serving_needs(merged: Path, exported: Path) -> None:
    for file in sorted(merged.iterdir()):
        if not (file.suffix == ".safetensors" or file.name.endswith(".index.json") or (exported / file.name).exists()):
            shutil.copyfile(file, exported / file.name)
