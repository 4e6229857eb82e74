"""A tiny base and prepared rows, and what tests of training ask a run for."""

import json
from pathlib import Path

import pytest

from qlora_core.artifacts import DataFile, DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.prepare import prepare
from qlora_core.events import ignore
from qlora_core.modeling.load import read_architecture
from qlora_core.recipe import DataRecipe, TrainRecipe
from qlora_core.training.spec import TrainSpec
from tests.tiny import write_model, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ModelSnapshot:
    path = write_model(tmp_path_factory.mktemp("base"))
    return ModelSnapshot(path=path, source="tiny", revision="1", digest="b" * 64, architecture=read_architecture(path))


@pytest.fixture(scope="module")
def dataset(base, tmp_path_factory) -> PreparedDataset:
    raw = tmp_path_factory.mktemp("raw")
    path = write_rows(raw / "rows.json")
    rows = (DataFile(name="rows.json", source="tiny", bytes=path.stat().st_size),)
    recipe = DataRecipe.model_validate({"rows": [{"source": "local", "path": str(path)}], "seq_len_tokens": 64})
    snapshot = DataSnapshot(path=raw, rows=rows)
    made = prepare(recipe, 17, base, snapshot, tmp_path_factory.mktemp("prepared"), ignore)
    return made.model_copy(update={"digest": "d" * 64})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def spec(recipe: TrainRecipe, base: ModelSnapshot, dataset: PreparedDataset, into: Path) -> TrainSpec:
    """What a training process is told."""
    return TrainSpec(recipe=recipe, seed=3, base=base, dataset=dataset, into=into)
