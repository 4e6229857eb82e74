import json
from pathlib import Path

import pytest

from qlora_core.artifacts import PreparedDataset
from qlora_core.events import ignore
from qlora_core.modeling.rows import read_prompts
from qlora_core.recipe import load_recipe
from tasks.preflight import prepared
from tasks.settings import Settings
from tests.tiny import write_recipe

ROWS = 300


def prepare(folder: Path, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> PreparedDataset:
    (folder / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setenv("QLORA_HOME", str(folder / "home"))
    return prepared(load_recipe(folder / "recipe.yaml"), Settings(), ignore)[1]


def questions(dataset: PreparedDataset) -> set[str]:
    return {prompt.prompt for prompt in read_prompts(dataset.path / "prompts.arrow")}


def test_one_percent_more_rows_keep_the_evaluation_rows_and_tokenize_the_new_ones_alone(tmp_path, monkeypatch):
    write_recipe(tmp_path)
    rows = [{"instruction": f"Paint door {at}.", "output": f"Door {at} is red."} for at in range(ROWS)]
    before = prepare(tmp_path, rows, monkeypatch)
    added = [{"instruction": f"Paint wall {at}.", "output": f"Wall {at} is blue."} for at in range(ROWS // 100)]
    after = prepare(tmp_path, added + rows, monkeypatch)
    assert (before.reused_rows, after.reused_rows) == (0, ROWS)
    assert after.train_rows + after.evaluation_rows == ROWS + len(added)
    assert {text for text in questions(after) if "door" in text} == questions(before)
