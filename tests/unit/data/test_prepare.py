import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_core.artifacts import DataFile, DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.prepare import prepare
from qlora_core.errors import DataError
from qlora_core.events import ignore
from qlora_core.modeling.rows import TokenRows, read_prompts
from qlora_core.recipe import DataRecipe


def recipe(**options: Any) -> DataRecipe:
    source = {"source": "local", "path": "."}
    return DataRecipe.model_validate({"rows": [source], "split": {"evaluation_fraction": 0.3}, **options})


def write_rows(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> DataSnapshot:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return DataSnapshot(path=folder, rows=(DataFile(name=name, source="test", bytes=path.stat().st_size),))


def alpaca(count: int) -> list[Any]:
    return [{"instruction": f"Count to {at}.", "output": " ".join(map(str, range(at)))} for at in range(1, count + 1)]


def run(
    base: ModelSnapshot, raw: DataSnapshot, into: Path, earlier: tuple[PreparedDataset, ...] = (), **options: Any
) -> PreparedDataset:
    into.mkdir(exist_ok=True)
    return prepare(recipe(**options), 17, base, raw, into, ignore, earlier)


def names(path: Path) -> set[str]:
    rows = TokenRows(path)
    return {rows[at].row_id for at in range(len(rows))}


def test_rows_prompts_and_counts_agree(base, tmp_path):
    record = run(base, write_rows(tmp_path, alpaca(40)), tmp_path / "out")
    train, evaluation = (TokenRows(tmp_path / "out" / f"{side}.arrow") for side in ("train", "evaluation"))
    assert record.train_rows + record.evaluation_rows == 40
    assert (len(train), len(evaluation)) == (record.train_rows, record.evaluation_rows)
    assert record.train_tokens == train.lengths.sum()
    assert record.trained_tokens == train.trained_tokens.sum()
    assert record.evaluation_trained_tokens == evaluation.trained_tokens.sum()
    assert [prompt.row_id for prompt in read_prompts(tmp_path / "out" / "prompts.arrow")] == [
        evaluation[at].row_id for at in range(len(evaluation))
    ]


def test_the_row_starts_with_its_prompt_and_the_mask_starts_where_the_prompt_ends(base, tmp_path):
    run(base, write_rows(tmp_path, alpaca(40)), tmp_path / "out")
    evaluation = TokenRows(tmp_path / "out" / "evaluation.arrow")
    for at, prompt in enumerate(read_prompts(tmp_path / "out" / "prompts.arrow")):
        row = evaluation[at]
        assert row.input_ids[: len(prompt.prompt_ids)].tolist() == prompt.prompt_ids
        assert np.flatnonzero(row.loss_mask)[0] == len(prompt.prompt_ids)


def test_added_rows_never_move_old_ones(base, tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir(), many.mkdir()
    run(base, write_rows(few, alpaca(40)), few / "out")
    run(base, write_rows(many, alpaca(60)), many / "out")
    for side in ("train", "evaluation"):
        assert names(few / "out" / f"{side}.arrow") <= names(many / "out" / f"{side}.arrow")


def test_only_rows_that_an_earlier_data_set_has_not_are_tokenized_again(base, tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir(), many.mkdir()
    earlier = run(base, write_rows(few, alpaca(40)), few / "out")
    raw = write_rows(many, [{"instruction": "new", "output": "first"}, *alpaca(40)])
    run(base, raw, many / "fresh")
    assert run(base, raw, many / "out", earlier=(earlier,)).reused_rows == 40
    for file in sorted((many / "out").iterdir()):
        assert file.read_bytes() == (many / "fresh" / file.name).read_bytes()


def test_an_earlier_data_set_that_was_made_in_another_way_is_not_used(base, tmp_path):
    raw = write_rows(tmp_path, alpaca(40))
    earlier = run(base, raw, tmp_path / "one", loss="last_turn")
    assert run(base, raw, tmp_path / "two", earlier=(earlier,)).reused_rows == 0
    same = run(base, raw, tmp_path / "three")
    assert run(base, raw, tmp_path / "four", earlier=(earlier, same)).reused_rows == 40


def test_too_long_rows_and_duplicates_are_dropped_and_counted(base, tmp_path):
    rows = [*alpaca(20), alpaca(1)[0], {"instruction": "long", "output": "word " * 500}]
    record = run(base, write_rows(tmp_path, rows), tmp_path / "out", seq_len_tokens=300)
    assert record.dropped == {"duplicate": 1, "too_long": 1}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dropped"]["duplicate"]["example"]["row"] == 21
    assert summary["read_rows"] == 22


def test_a_few_bad_rows_are_counted_and_too_many_fail_with_a_table(base, tmp_path):
    rows = [*alpaca(30), {"question": "?"}]
    raw = write_rows(tmp_path, rows)
    assert run(base, raw, tmp_path / "out", max_bad_rows=0.1).dropped == {"unknown_format": 1}
    with pytest.raises(DataError, match=r"1 of 31 rows cannot be used(.|\n)*unknown_format(.|\n)*rows.jsonl:31"):
        run(base, raw, tmp_path / "out", max_bad_rows=0.01)


def test_an_empty_side_of_the_split_is_an_error(base, tmp_path):
    with pytest.raises(DataError, match="no row is left for"):
        run(base, write_rows(tmp_path, alpaca(1)), tmp_path / "out")


def test_rows_that_call_one_function_stay_on_one_side(base, tmp_path):
    def calling(at: int) -> dict[str, Any]:
        name = f"function_{at % 8}"
        turns = [
            {"from": "human", "value": f"question {at}"},
            {"from": "function_call", "value": json.dumps({"name": name, "arguments": {"a": at}})},
        ]
        return {"conversations": turns, "tools": json.dumps([{"name": name}])}

    split = {"by": "function", "evaluation_fraction": 0.4}
    raw = write_rows(tmp_path, [calling(at) for at in range(64)])
    run(base, raw, tmp_path / "out", split=split, tool_calls={"system_prompt": "Call."})
    sides = [
        {int(row.rpartition(":")[2]) % 8 for row in names(tmp_path / "out" / f"{side}.arrow")}
        for side in ("train", "evaluation")
    ]
    assert sides[0] and sides[1]
    assert not sides[0] & sides[1]


def test_rows_with_one_value_in_the_split_column_stay_on_one_side(base, tmp_path):
    rows = [{**row, "topic": f"topic {at % 8}"} for at, row in enumerate(alpaca(64), 1)]
    split = {"by": "column", "column": "topic", "evaluation_fraction": 0.4}
    run(base, write_rows(tmp_path, rows), tmp_path / "out", split=split)
    sides = [
        {int(row.rpartition(":")[2]) % 8 for row in names(tmp_path / "out" / f"{side}.arrow")}
        for side in ("train", "evaluation")
    ]
    assert sides[0] and sides[1]
    assert not sides[0] & sides[1]


def test_forgetting_text_is_cut_into_windows_with_loss_on_all_but_the_first_token(base, tmp_path):
    raw = write_rows(tmp_path, alpaca(40))
    (tmp_path / "wiki.txt").write_text("The quick brown fox rests. " * 400)
    text = DataFile(name="wiki.txt", source="test", bytes=1)
    raw = raw.model_copy(update={"forgetting": (text,)})
    record = run(base, raw, tmp_path / "out", seq_len_tokens=256, forgetting_tokens=1000)
    windows = TokenRows(tmp_path / "out" / "forgetting.arrow")
    assert record.forgetting_tokens == windows.lengths.sum() == 1000
    assert windows.lengths.tolist() == [256, 256, 256, 232]
    assert windows.trained_tokens.tolist() == [255, 255, 255, 231]


def test_the_preview_shows_three_rows_with_their_trained_text(base, tmp_path):
    run(base, write_rows(tmp_path, alpaca(40)), tmp_path / "out")
    preview = json.loads((tmp_path / "out" / "preview.json").read_text())
    assert len(preview) == 3
    trained = [part["text"] for part in preview[0]["segments"] if part["trained"]]
    assert trained == ["0 1<|im_end|>"]


def test_two_runs_write_the_same_bytes(base, tmp_path):
    raw = write_rows(tmp_path, alpaca(40))
    for into in ("one", "two"):
        run(base, raw, tmp_path / into)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_page_shows_reasons_and_trained_text_and_escapes_what_rows_say(base, tmp_path):
    rows = [{"instruction": f"<b>{at}</b>", "output": "<script>alert(1)</script>"} for at in range(40)]
    run(base, write_rows(tmp_path, [*rows, rows[0]]), tmp_path / "out")
    page = (tmp_path / "out" / "page.html").read_text()
    assert '<span class="trained">&lt;script&gt;alert(1)&lt;/script&gt;&lt;|im_end|&gt;</span>' in page
    assert "<script>" not in page
    assert "<code>duplicate</code>" in page
    assert "rows.jsonl:41" in page


def test_rows_longer_than_the_model_can_read_are_refused_with_the_length_to_set(base, tmp_path):
    facts = base.architecture.model_copy(update={"context_tokens": 512})
    short = base.model_copy(update={"architecture": facts})
    raw = write_rows(tmp_path, alpaca(200))
    with pytest.raises(DataError, match=r"data\.seq_len_tokens is 513.* at most 512.*set it to 512"):
        run(short, raw, tmp_path / "out", seq_len_tokens=513)
    assert run(short, raw, tmp_path / "out", seq_len_tokens=512).longest_row_tokens <= 512


def test_a_length_that_nobody_has_set_is_lowered_to_what_the_model_can_read(base, tmp_path):
    facts = base.architecture.model_copy(update={"context_tokens": 128})
    short = base.model_copy(update={"architecture": facts})
    record = run(short, write_rows(tmp_path, alpaca(60)), tmp_path / "out")
    assert record.longest_row_tokens <= 128
    assert record.dropped["too_long"] > 0


def test_a_model_without_positions_reads_rows_of_any_length(base, tmp_path):
    facts = base.architecture.model_copy(update={"context_tokens": None})
    run(base.model_copy(update={"architecture": facts}), write_rows(tmp_path, alpaca(40)), tmp_path / "out")
