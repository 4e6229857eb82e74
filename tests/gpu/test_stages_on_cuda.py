"""The stages that compute, on a CUDA device: train, resume, merge with its proof, evaluate."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qlora_core.artifacts import Adapter, DataFile, DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.prepare import prepare
from qlora_core.evaluation.evaluate import evaluate
from qlora_core.events import Note, ignore
from qlora_core.merging.merge import merge
from qlora_core.modeling.load import read_architecture
from qlora_core.recipe import DataRecipe, EvaluationRecipe, Generation, Lora, MergeRecipe, TrainRecipe
from qlora_core.training.launch import train
from tests.tiny import write_model, write_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RECIPE = TrainRecipe(
    lora=Lora(rank=8, alpha=16, dropout=0.1),
    epochs=10,
    max_steps=12,
    effective_batch_rows=8,
    micro_batch_size=4,
    learning_rate=1e-2,
    checkpoint_every_steps=4,
    processes=1,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSnapshot:
    path = write_model(tmp_path_factory.mktemp("base"), hidden=256)
    return ModelSnapshot(path=path, source="tiny", revision="1", digest="b" * 64, architecture=read_architecture(path))


@pytest.fixture(scope="module")
def dataset(base: ModelSnapshot, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    raw = tmp_path_factory.mktemp("raw")
    path = write_rows(raw / "rows.json")
    snapshot = DataSnapshot(path=raw, rows=(DataFile(name="rows.json", source="tiny", bytes=path.stat().st_size),))
    recipe = DataRecipe.model_validate({"rows": [{"source": "local", "path": str(path)}], "seq_len_tokens": 64})
    made = prepare(recipe, 17, base, snapshot, tmp_path_factory.mktemp("prepared"), ignore)
    return made.model_copy(update={"digest": "d" * 64})


@pytest.fixture(scope="module")
def adapter(base: ModelSnapshot, dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    made = train(RECIPE, 3, base, dataset, tmp_path_factory.mktemp("adapter"), ignore)
    return made.model_copy(update={"digest": "a" * 64})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def test_training_runs_in_bf16_and_the_loss_falls(adapter):
    log = (adapter.path / "child" / "events.jsonl").read_text()
    assert "in bfloat16" in log
    assert adapter.train_loss < losses(adapter.path)[0] - 0.3
    last = json.loads((adapter.path / "history.jsonl").read_text().splitlines()[-1])
    assert last["peak_memory_gib"] > 0
    assert ("gpu_energy_j" in last) == (find_spec("pynvml") is not None)


def test_a_resumed_run_ends_like_an_uninterrupted_one(base, dataset, adapter, tmp_path):
    half = RECIPE.model_copy(update={"max_steps": 12})
    train(half, 3, base, dataset, tmp_path, ignore)
    (tmp_path / "checkpoints" / "step-00000012" / "state.json").unlink()
    notes: list[str] = []
    train(half, 3, base, dataset, tmp_path, lambda e: notes.append(e.message) if isinstance(e, Note) else None)
    assert "resumed after step 8" in notes
    assert losses(tmp_path) == pytest.approx(losses(adapter.path), abs=1e-2)


def test_the_merge_is_proven_and_the_merged_model_is_better(base, dataset, adapter, tmp_path):
    merged = merge(MergeRecipe(), base, adapter, dataset, tmp_path / "merged", ignore)
    assert merged.proof.top1_agreement > 0.9
    recipe = EvaluationRecipe(metrics=("loss", "exact_match"), generation=Generation(max_new_tokens=12))
    before, after = (
        evaluate(recipe, 17, path, "m" * 64, dataset, tmp_path / name, ignore)
        for name, path in (("before", base.path), ("after", merged.path / "model"))
    )
    assert after.scores["loss"] < before.scores["loss"] - 0.3
