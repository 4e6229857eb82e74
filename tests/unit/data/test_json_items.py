import io
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.data import json_items
from qlora_core.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(params=[1, 7])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every value is cut by their edges."""
    monkeypatch.setattr(json_items, "BLOCK_CHARACTERS", request.param)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_a_stream_gives_what_reading_at_once_gives(small_blocks, values: list[Any], indent: int | None, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    assert list(json_items.items(io.StringIO(text), "rows.json")) == values


def test_the_place_of_an_error_is_right_wherever_blocks_end(small_blocks):
    text = '[\n {"a": "b"},\n {"a": 1,\n  "b": oops}\n]'
    with pytest.raises(DataError, match=r"rows.json, line 4, column 8: Expecting value"):
        list(json_items.items(io.StringIO(text), "rows.json"))


def test_rows_before_an_error_are_given(small_blocks):
    stream = json_items.items(io.StringIO('[1, 2, {"a"'), "rows.json")
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(DataError):
        next(stream)
