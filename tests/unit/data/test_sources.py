"""Several sources at once, rows that are for evaluation alone, and text that is learnt as it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qlora_core.artifacts import DataFile, DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.prepare import prepare
from qlora_core.data.split import copies
from qlora_core.events import ignore
from qlora_core.modeling.rows import TokenRows, read_prompts
from qlora_core.modeling.tokenizer import load_tokenizer
from qlora_core.recipe import DataRecipe

SOURCE = {"source": "local", "path": "."}


def counting(numbers: range) -> list[Any]:
    return [{"instruction": f"Count to {at}.", "output": " ".join(map(str, range(at)))} for at in numbers]


def write(folder: Path, **files: list[Any]) -> DataSnapshot:
    """A snapshot with a file for each source of `rows`, and one for evaluation if there is a file of that name."""
    found = []
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(DataFile(name=path.name, source="test", bytes=path.stat().st_size, entry=len(found)))
    evaluation = tuple(file for file in found if file.name == "evaluation.jsonl")
    return DataSnapshot(
        path=folder, rows=tuple(file for file in found if file not in evaluation), evaluation=evaluation
    )


def run(
    base: ModelSnapshot, raw: DataSnapshot, into: Path, earlier: tuple[PreparedDataset, ...] = (), **recipe: Any
) -> PreparedDataset:
    into.mkdir()
    options = {"rows": [SOURCE], "split": {"evaluation_fraction": 0.3}, "near_duplicates": "ignore", **recipe}
    return prepare(DataRecipe.model_validate(options), 17, base, raw, into, ignore, earlier)


def names(dataset: PreparedDataset, side: str) -> list[str]:
    rows = TokenRows(dataset.path / f"{side}.arrow")
    return [rows[at].row_id for at in range(len(rows))]


def test_a_weight_repeats_training_rows_or_leaves_rows_out_and_a_cap_takes_the_first(base, tmp_path):
    raw = write(tmp_path, a=counting(range(1, 41)), b=counting(range(41, 81)), c=counting(range(81, 121)))
    shares = [{"weight": 2}, {"weight": 0.25}, {"max_rows": 7}]
    dataset = run(base, raw, tmp_path / "out", rows=[{**SOURCE, **share} for share in shares])
    train, evaluation = names(dataset, "train"), names(dataset, "evaluation")
    assert {train.count(name) for name in train if name.startswith("a.")} == {2}
    assert {train.count(name) for name in train if not name.startswith("a.")} == {1}
    assert len(evaluation) == len(set(evaluation))
    used = {file: {name for name in train + evaluation if name.startswith(file)} for file in "abc"}
    assert len(used["a"]) == 40
    assert 4 <= len(used["b"]) <= 16
    assert used["c"] == {f"c.jsonl:{at}" for at in range(1, 8)}
    assert dataset.dropped == {"left_out": 40 - len(used["b"]) + 33}


def test_the_summary_counts_each_file_and_shows_rows_of_several(base, tmp_path):
    raw = write(tmp_path, a=counting(range(1, 41)), b=[*counting(range(41, 61)), {}], c=counting(range(61, 81)))
    dataset = run(base, raw, tmp_path / "out", rows=[SOURCE, SOURCE, SOURCE], max_bad_rows=0.1)
    summary = json.loads((dataset.path / "summary.json").read_text())
    files = {file["file"]: file for file in summary["files"]}
    assert [file["read_rows"] for file in files.values()] == [40, 21, 20]
    assert (files["b.jsonl"]["dropped_rows"], files["a.jsonl"]["dropped_rows"]) == (1, 0)
    assert sum(file["train_tokens"] for file in files.values()) == dataset.train_tokens
    train = names(dataset, "train")
    assert all(sum(row.startswith(name) for row in train) == file["train_rows"] for name, file in files.items())
    shown = [row["row_id"] for row in json.loads((dataset.path / "preview.json").read_text())]
    assert shown == [next(row for row in train if row.startswith(file)) for file in "abc"]
    page = (dataset.path / "page.html").read_text()
    assert all(text in page for text in ("b.jsonl:21", "unknown_format", f"{dataset.train_tokens:,}"))


def test_a_repeated_row_is_reused_as_itself(base, tmp_path):
    raw = write(tmp_path, a=counting(range(1, 41)))
    rows = [{**SOURCE, "weight": 2.5}]
    first = run(base, raw, tmp_path / "first", rows=rows)
    second = run(base, raw, tmp_path / "second", (first,), rows=rows)
    assert second.reused_rows == second.train_rows + second.evaluation_rows
    for name in ("train.arrow", "evaluation.arrow", "prompts.arrow"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.75])
def test_a_weight_is_kept_on_average_and_a_higher_one_never_takes_a_row_away(weight):
    taken = [copies(f"row {at}", weight) for at in range(4000)]
    assert abs(np.mean(taken) - weight) < 0.05
    assert all(copies(f"row {at}", weight + 0.1) >= taken[at] for at in range(4000))


def test_rows_of_an_evaluation_file_are_never_trained_on(base, tmp_path):
    raw = write(tmp_path, rows=counting(range(1, 41)), evaluation=counting(range(31, 46)))
    dataset = run(base, raw, tmp_path / "out", evaluation_rows=[SOURCE], split={})
    assert names(dataset, "evaluation") == [f"evaluation.jsonl:{at}" for at in range(1, 16)]
    assert names(dataset, "train") == [f"rows.jsonl:{at}" for at in range(1, 31)]
    assert dataset.dropped == {"leak": 10}


def test_a_column_may_say_the_side_itself(base, tmp_path):
    rows = [{**row, "fold": ["train", "dev", "test"][at % 3]} for at, row in enumerate(counting(range(1, 31)))]
    split = {"by": "label", "column": "fold", "evaluation_labels": ["dev", "test"]}
    dataset = run(base, write(tmp_path, rows=rows), tmp_path / "out", split=split)
    assert names(dataset, "train") == [f"rows.jsonl:{at}" for at in range(1, 31, 3)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"evaluation_rows": [SOURCE], "split": {"evaluation_fraction": 0.3}},
        {"split": {"by": "label", "column": "fold"}},
        {"split": {"by": "column", "column": "id", "evaluation_labels": ["dev"]}},
        {"rows": [{**SOURCE, "weight": 0}]},
    ],
)
def test_what_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValidationError):
        DataRecipe.model_validate({"rows": [SOURCE], **wrong})


def test_plain_text_is_learnt_whole_and_as_it_is(base, tmp_path):
    texts = [f"<|im_start|>user\nName {at} things.<|im_end|>\nThey are many, {at} in all." for at in range(30)]
    raw = write(tmp_path, rows=[{"text": text} for text in texts])
    dataset = run(base, raw, tmp_path / "out", format="text")
    tokenizer = load_tokenizer(base.path)
    train = TokenRows(dataset.path / "train.arrow")
    for row in (train[at] for at in range(len(train))):
        at = int(row.row_id.partition(":")[2]) - 1
        assert tokenizer.decode(row.input_ids) == texts[at] + tokenizer.eos_token
        assert row.loss_mask[1:].all()
    for prompt in read_prompts(dataset.path / "prompts.arrow"):
        at = int(prompt.row_id.partition(":")[2]) - 1
        assert prompt.prompt
        assert f"{prompt.prompt} {prompt.expected}" == texts[at]


def test_plain_text_that_is_too_long_is_cut_between_lines(base, tmp_path):
    lines = [f"line {at} of a long text\n" for at in range(40)]
    raw = write(tmp_path, rows=[{"text": "".join(lines)}, *({"text": f"text {at}"} for at in range(30))])
    dataset = run(base, raw, tmp_path / "out", format="text", seq_len_tokens=100, too_long="split")
    tokenizer = load_tokenizer(base.path)
    rows = [TokenRows(dataset.path / f"{side}.arrow") for side in ("train", "evaluation")]
    parts = [row for side in rows for row in (side[at] for at in range(len(side))) if "jsonl:1#" in row.row_id]
    assert len(parts) > 1
    said = "".join(tokenizer.decode(part.input_ids).removesuffix(tokenizer.eos_token) for part in parts)
    assert said == "".join(lines)
    assert dataset.noticed == {"shortened": 1}
