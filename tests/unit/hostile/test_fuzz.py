"""Random damage to what is read from outside: it is read or refused, and nothing else is ever raised."""

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qlora_core.errors import QloraError
from qlora_core.merging.adapter import read_changes
from qlora_core.merging.tensors import read_file
from qlora_core.recipe import load_recipe
from tests.unit.hostile.fuzz import TARGETS
from tests.unit.hostile.recipes import GOOD

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)
QUIETLY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
WEIGHTS = save({f"{PREFIX}A.weight": torch.ones(4, 8), f"{PREFIX}B.weight": torch.ones(8, 4)})
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}, "bias": "none"}


def headed(header: bytes) -> bytes:
    """A safetensors file without tensors."""
    return len(header).to_bytes(8, "little") + header


def parquet_of_no_text() -> bytes:
    """Its column's name is no UTF-8."""
    made = io.BytesIO()
    pq.write_table(pa.table({"instruction": ["a"]}), made)
    return made.getvalue().replace(b"instruction", b"\x9bnstruction")


def zip_of_no_name() -> bytes:
    """Its file's name has no character."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a", b"x")
    content = bytearray(made.getvalue())
    end, central = content.rindex(b"PK\x05\x06"), content.rindex(b"PK\x01\x02")
    content[central + 28] = 0  # length of the name
    del content[central + 46]
    content[end - 1 + 12] -= 1  # size of the directory
    return bytes(content)


FOUND = [
    pytest.param(
        "tensor_header", headed(b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}'), id="tensor without a shape"
    ),
    pytest.param("tensor_header", headed(b"[" * 100_000), id="header that nests 100,000 deep"),
    pytest.param(
        "tensor_header", headed(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 0]}}'), id="no bytes"
    ),
    pytest.param("tensor_index", b"", id="empty index"),
    pytest.param("tensor_index", b'{"weight_map": {"a": "../model.safetensors"}}', id="index that climbs"),
    pytest.param("model_config", b"", id="empty config"),
    pytest.param("model_config", b"[]", id="config that is a list"),
    pytest.param("recipe", b"? {a: 1}\n: 1", id="key that is a mapping"),
    pytest.param("archive", zip_of_no_name(), id="file without a name"),
    pytest.param("rows", b"\x03" + parquet_of_no_text(), id="column that is no text"),
]
"""What `make fuzz` found, and its like; the first byte of rows says what the file is called."""


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Some bytes changed, some left out, some put in."""
    edits = st.lists(st.tuples(st.integers(0, len(content)), st.binary(max_size=4), st.integers(0, 8)), max_size=4)

    def apply(changes: list[tuple[int, bytes, int]]) -> bytes:
        made = content
        for at, new, gone in changes:
            made = made[:at] + new + made[at + gone :]
        return made

    return edits.map(apply)


def read(action: Callable[[], object]) -> None:
    with suppress(QloraError):
        action()


@QUIETLY
@given(content=damaged(json.dumps(GOOD, indent=1).encode()) | st.binary(max_size=300))
@example(content=b"name: 2026-99-99")
@example(content=b"? [a]\n: 1")
def test_a_recipe_is_read_or_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    read(lambda: load_recipe(path))


@QUIETLY
@given(key=st.sampled_from(["model", "data", "train", "merge", "evaluation", "promotion", "seed", "name"]), value=JSON)
@example(key="data", value={"\ud800\udc00": None})
def test_a_recipe_with_any_value_anywhere_is_read_or_refused(tmp_path: Path, key: str, value: object):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**GOOD, key: value}))
    read(lambda: load_recipe(path))


@QUIETLY
@given(key=st.sampled_from(sorted(CONFIG)), value=JSON, weights=st.just(WEIGHTS) | damaged(WEIGHTS))
@example(key="rank_pattern", value={"(": 4}, weights=WEIGHTS)
@example(key="r", value=0, weights=WEIGHTS)
def test_an_adapter_is_read_or_refused(tmp_path: Path, key: str, value: object, weights: bytes):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, key: value}))
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    read(lambda: read_changes(tmp_path, {}, tied=False))


@QUIETLY
@given(content=damaged(WEIGHTS) | JSON.map(lambda value: headed(json.dumps(value).encode())))
def test_a_tensor_file_is_read_or_refused(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    read(lambda: read_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(("reader", "content"), FOUND)
def test_what_fuzzing_found_is_refused(tmp_path: Path, reader: str, content: bytes):
    with pytest.raises(QloraError):
        TARGETS[reader](content, tmp_path)


@pytest.mark.parametrize("text", ["name=[", "data.rows=&a [*a]", "train.lora.rank=!!python/name:os.system"])
def test_an_override_that_is_no_value_is_refused(tmp_path: Path, text: str):
    (tmp_path / "recipe.yaml").write_text(json.dumps(GOOD))
    with pytest.raises(QloraError):
        load_recipe(tmp_path / "recipe.yaml", (text,))
