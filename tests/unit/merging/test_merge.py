"""The stage as a whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.artifacts import MergedModel
from qlora_core.events import ignore
from qlora_core.merging.merge import merge
from qlora_core.merging.spec import MergeSpec
from qlora_core.recipe import Quantization


def run(case: MergeSpec) -> MergedModel:
    return merge(case.recipe, case.base, case.adapter, case.dataset, case.into, ignore, Quantization())


def test_a_merge_writes_model_and_proof(make_case: Callable[..., MergeSpec], tmp_path: Path) -> None:
    case = make_case("llama", shards="50KB", hidden=64)
    merged = run(case)
    assert merged.path == tmp_path / "into"
    assert len(merged.proof.changed) == 14
    assert merged.proof.tensors == merged.proof.unchanged + 14
    assert merged.proof.top1_agreement == 1.0
    assert merged.proof.kl_divergence < 1e-6
    assert merged.proof.probe_tokens == 144
    assert merged.proof.losses["merged"] == pytest.approx(merged.proof.losses["base_and_adapter"], rel=1e-5)
    assert abs(merged.proof.losses["quantized_base_and_adapter"] - merged.proof.losses["merged"]) > 1e-3
    assert merged.proof.answers == 2
    names = {file.name for file in (merged.path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "LICENSE"} <= names
    rows = json.loads((merged.path / "proof" / "changes.json").read_text())
    assert all(0 < row["relative"] < 1 for row in rows)
    assert (merged.path / "proof" / "changes.png").stat().st_size > 1000
