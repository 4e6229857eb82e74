"""Merged models in 4 bits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qlora_core.events import ignore
from qlora_core.merging.card import write_card
from qlora_core.merging.export import ExportSpec, Kind
from qlora_core.merging.export_worker import work
from qlora_core.merging.spec import MODEL, MergeSpec
from qlora_core.merging.worker import write_model


def export_spec(case: MergeSpec, kind: Kind, into: Path) -> ExportSpec:
    changed = write_model(case, ignore)
    write_card(case, len(changed), 21, case.base.dtype)
    return ExportSpec(kind=kind, model=case.into / MODEL, model_digest="f" * 64, dataset=case.dataset, into=into)


KINDS = [
    pytest.param("nf4", "bitsandbytes"),
    pytest.param("gptq-int4", "gptq", marks=[pytest.mark.slow, pytest.mark.gptq]),
]


@pytest.mark.parametrize(("kind", "method"), KINDS)
def test_an_export_loads_by_itself_and_is_measured(
    make_case: Callable[..., MergeSpec], tmp_path: Path, kind: Kind, method: str
) -> None:
    case = make_case("llama", torch.bfloat16, hidden=128)
    exported = work(export_spec(case, kind, tmp_path / "export").model_dump(mode="json"), ignore)
    folder = exported.path / "model"
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == method
    assert not settings.get("dataset")
    assert 0 < exported.kl_divergence < 1
    assert exported.losses["exported"] == pytest.approx(exported.losses["merged"], rel=0.2)
    assert exported.bytes < (case.into / "model" / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(folder).chat_template is not None
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == json.loads((case.into / "model" / "generation_config.json").read_text())["eos_token_id"]
    card = (folder / "README.md").read_text()
    assert f"Quantized to {kind}" in card
    assert f"{exported.losses['exported']:.4f}" in card
