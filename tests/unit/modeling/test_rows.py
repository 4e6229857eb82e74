import numpy as np
import pytest

from qlora_core.modeling.rows import TokenRow, TokenRows, token_row_writer


def row(name: str, *ids: int) -> TokenRow:
    return TokenRow(name, np.array(ids, np.int32), np.ones(len(ids), np.uint8))


def test_rows_of_several_batches_are_read_as_one_sequence(tmp_path):
    with token_row_writer(tmp_path / "rows.arrow") as write:
        write([row("a", 1, 2), row("b", 3)])
        write([])
        write([row("c", 4, 5, 6)])
    rows = TokenRows(tmp_path / "rows.arrow")
    assert [rows[at].row_id for at in range(len(rows))] == ["a", "b", "c"]
    assert rows[-1].input_ids.tolist() == [4, 5, 6]
    assert rows[2].loss_mask.tolist() == [0, 1, 1]
    assert rows.lengths.tolist() == [2, 1, 3]
    assert rows.trained_tokens.tolist() == [1, 0, 2]
    with pytest.raises(IndexError):
        rows[3]


def test_a_file_without_rows_is_empty(tmp_path):
    with token_row_writer(tmp_path / "rows.arrow"):
        pass
    rows = TokenRows(tmp_path / "rows.arrow")
    assert (len(rows), rows.lengths.tolist(), rows.trained_tokens.tolist()) == (0, [], [])


def test_tokens_are_counted_once_however_often_a_step_asks(tmp_path):
    with token_row_writer(tmp_path / "rows.arrow") as write:
        write([row("a", 1, 2), row("b", 3, 4, 5)])
    rows = TokenRows(tmp_path / "rows.arrow")
    assert rows.trained_tokens is rows.trained_tokens
    assert rows.lengths is rows.lengths
    with pytest.raises(ValueError, match="read-only"):
        rows.lengths[0] = 7
