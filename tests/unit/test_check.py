"""What `qlora check` prints about prepared rows."""

import json

from flows.show import show_check
from qlora_core.artifacts import DataFile, DataSnapshot, ModelSnapshot
from qlora_core.data.prepare import prepare
from qlora_core.events import ignore
from qlora_core.modeling.load import read_architecture
from qlora_core.recipe import Recipe
from tests.tiny import write_model


def test_check_shows_counts_reasons_with_an_example_and_trained_rows(tmp_path, capsys):
    rows = [{"prompt": f"Say {at}.", "completion": f"It is {at}."} for at in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"prompt": "?"}]))
    source = {"source": "local", "path": str(tmp_path)}
    data = {"rows": [source], "max_bad_rows": 0.5, "near_duplicates": "ignore", "split": {"evaluation_fraction": 0.3}}
    recipe = Recipe.model_validate({"name": "tiny", "model": source, "data": data})
    model = write_model(tmp_path / "model")
    base = ModelSnapshot(path=model, source="tiny", revision="1", architecture=read_architecture(model))
    raw = DataSnapshot(path=tmp_path, rows=(DataFile(name="rows.jsonl", source="test", bytes=1),))
    (tmp_path / "out").mkdir()
    dataset = prepare(recipe.data, recipe.seed, base, raw, tmp_path / "out", ignore)
    show_check(recipe, base, dataset)
    printed = capsys.readouterr().out
    assert f"{dataset.train_rows} to train on, {dataset.evaluation_rows} to evaluate on" in printed
    assert "rows.jsonl:31" in printed
    assert "rows.jsonl:32: the row has prompt; known are" in printed
    assert str(tmp_path / "out" / "page.html") in printed.replace("\n", "")
    for row in json.loads((tmp_path / "out" / "preview.json").read_text()):
        assert all(segment["text"].strip() in printed for segment in row["segments"])
