"""The stage as a whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.artifacts import MergedModel
from qlora_core.errors import MergeError
from qlora_core.events import ignore
from qlora_core.merging.merge import merge
from qlora_core.merging.spec import MergeSpec


def run(case: MergeSpec) -> MergedModel:
    return merge(case.recipe, case.base, case.adapter, case.dataset, case.into, ignore)


def test_a_merge_writes_model_and_proof(make_case: Callable[..., MergeSpec], tmp_path: Path) -> None:
    case = make_case("llama", shards="50KB")
    merged = run(case)
    assert merged.path == tmp_path / "into"
    assert len(merged.proof.changed) == 14
    assert merged.proof.tensors == merged.proof.unchanged + 14
    assert merged.proof.top1_agreement == 1.0
    assert merged.proof.kl_divergence < 1e-6
    assert merged.proof.probe_tokens == 144
    names = {file.name for file in (merged.path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "LICENSE"} <= names
    rows = json.loads((merged.path / "proof" / "changes.json").read_text())
    assert all(0 < row["relative"] < 1 for row in rows)
    assert (merged.path / "proof" / "changes.png").stat().st_size > 1000


def test_another_base_is_refused(make_case: Callable[..., MergeSpec], tmp_path: Path) -> None:
    case = make_case()
    other = case.base.model_copy(update={"digest": "c" * 64})
    with pytest.raises(MergeError, match=r"bbbbbbbbbbbb.*cccccccccccc"):
        merge(case.recipe, other, case.adapter, case.dataset, tmp_path / "into", ignore)
