import csv
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qlora_core.artifacts import DataFile, DataSnapshot
from qlora_core.data.candidates import Candidates
from qlora_core.data.read import inspect
from qlora_core.data.reasons import REASONS
from qlora_core.data.reuse import Earlier
from qlora_core.data.summary import Tally
from qlora_core.data.template import ChatTemplate
from qlora_core.errors import DataError
from qlora_core.recipe import DataRecipe

GOOD = b'{"instruction": "a", "output": "b"}\n'
CALL = {"name": "add", "arguments": {}}


class Defect(NamedTuple):
    code: str
    row: Any
    """An object that becomes a line, or the bytes of the line."""
    format: str = "auto"
    tool_calls: bool = False


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in turns]}


def messages(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


def answer(text: Any) -> dict[str, Any]:
    return {"instruction": "a", "output": text}


def calling(value: Any, **fields: Any) -> dict[str, Any]:
    return {**chat(("human", "a"), ("function_call", value)), **fields}


ROWS = {
    "a thousand pages": Defect("too_large", answer("word " * 800_001)),
    "a thousand pages of plain text": Defect("too_large", {"text": "word " * 800_001}, format="text"),
    "a cut line": Defect("not_json", b'{"instruction": "a", "out'),
    "single quotes": Defect("not_json", b"{'instruction': 'a', 'output': 'b'}"),
    "a trailing comma": Defect("not_json", b'{"instruction": "a", "output": "b",}'),
    "two objects in one line": Defect("not_json", b'{"instruction": "a", "output": "b"} {}'),
    "not a number": Defect("not_json", b'{"instruction": "a", "output": "b", "score": NaN}'),
    "infinity": Defect("not_json", b'{"instruction": "a", "output": "b", "score": -Infinity}'),
    "a raw tab in a string": Defect("not_json", b'{"instruction": "a\tb", "output": "b"}'),
    "a bad escape": Defect("not_json", rb'{"instruction": "C:\dir", "output": "b"}'),
    "nesting without end": Defect("not_json", b"[" * 100_000),
    "a number of 5000 digits": Defect("not_json", b'{"instruction": "a", "output": ' + b"9" * 5000 + b"}"),
    "plain text": Defect("not_json", b"Hello there"),
    "GBK": Defect("bad_encoding", '{"instruction": "你好", "output": "谢谢"}'.encode("gbk")),
    "Latin-1": Defect("bad_encoding", '{"instruction": "Zürich", "output": "b"}'.encode("latin-1")),
    "a cut character": Defect("bad_encoding", '{"instruction": "你'.encode()[:-1] + b'", "output": "b"}'),
    "a list": Defect("not_object", ["a", "b"]),
    "a string": Defect("not_object", "a"),
    "a number": Defect("not_object", 7),
    "null": Defect("not_object", None),
    "an empty object": Defect("unknown_format", {}),
    "other fields": Defect("unknown_format", {"question": "a", "answer": "b"}),
    "fields in capitals": Defect("unknown_format", {"Instruction": "a", "Output": "b"}),
    "no output": Defect("missing_field", {"instruction": "a"}, "alpaca"),
    "chat where alpaca was named": Defect("missing_field", chat(("human", "a"), ("gpt", "b")), "alpaca"),
    "a turn without value": Defect("missing_field", {"conversations": [{"from": "human"}]}),
    "a turn without from": Defect("missing_field", {"conversations": [{"value": "a"}]}),
    "a message without role": Defect("missing_field", messages({"content": "a"})),
    "a number as output": Defect("wrong_type", answer(7)),
    "a list as output": Defect("wrong_type", answer(["b"])),
    "null as output": Defect("wrong_type", answer(None)),
    "an object as input": Defect("wrong_type", {"instruction": "a", "input": {"x": 1}, "output": "b"}),
    "conversations as text": Defect("wrong_type", {"conversations": "a"}),
    "conversations as null": Defect("wrong_type", {"conversations": None}),
    "turns as text": Defect("wrong_type", {"conversations": ["a", "b"]}),
    "a value that is a number": Defect("wrong_type", chat(("human", 1), ("gpt", "b"))),
    "content that is a number": Defect("wrong_type", messages({"role": "user", "content": 1})),
    "history as a number": Defect("wrong_type", {**answer("b"), "history": 7}),
    "history with three in a pair": Defect("wrong_type", {**answer("b"), "history": [["a", "b", "c"]]}),
    "history with numbers": Defect("wrong_type", {**answer("b"), "history": [[1, 2]]}),
    "system as a list": Defect("wrong_type", {**answer("b"), "system": ["be kind"]}),
    "a role that nobody knows": Defect("unknown_role", chat(("human", "a"), ("narrator", "b"))),
    "an empty role": Defect("unknown_role", messages({"role": "", "content": "a"})),
    "the assistant first": Defect("role_order", chat(("gpt", "b"), ("human", "a"))),
    "the assistant twice": Defect("role_order", chat(("human", "a"), ("gpt", "b"), ("gpt", "c"))),
    "a late system prompt": Defect("role_order", chat(("human", "a"), ("system", "x"), ("gpt", "b"))),
    "two system prompts": Defect("role_order", chat(("system", "x"), ("system", "y"), ("human", "a"), ("gpt", "b"))),
    "a system prompt and an answer": Defect("role_order", chat(("system", "x"), ("gpt", "b"))),
    "an observation of nothing": Defect("role_order", chat(("human", "a"), ("observation", "x"), ("gpt", "b"))),
    "a tool after plain talk": Defect("role_order", chat(("human", "a"), ("gpt", "b"), ("observation", "x"))),
    "an empty answer": Defect("empty_message", answer("")),
    "an answer of spaces": Defect("empty_message", answer(" \n\t")),
    "an empty question": Defect("empty_message", {"instruction": "", "input": "", "output": "b"}),
    "an empty turn": Defect("empty_message", chat(("human", "a"), ("gpt", "b"), ("human", ""), ("gpt", "c"))),
    "null content without calls": Defect(
        "empty_message", messages({"role": "user", "content": "a"}, {"role": "assistant", "content": None})
    ),
    "plain text in `text`": Defect("unknown_transcript", {"text": "It was a dark and stormy night."}),
    "text before the first turn": Defect("unknown_transcript", {"text": "x <|im_start|>user\na<|im_end|>"}),
    "a turn that is not closed": Defect("unknown_transcript", {"text": "<|im_start|>user\na"}),
    "an [INST] that is not closed": Defect("unknown_transcript", {"text": "<s>[INST] a"}),
    "an [INST] without an answer": Defect("no_answer", {"text": "<s>[INST] a [/INST]"}),
    "a number as completion": Defect("wrong_type", {"prompt": "a", "completion": 1}),
    "calls by the user": Defect("bad_tool_call", messages({"role": "user", "content": "a", "tool_calls": [CALL]})),
    "a train flag in words": Defect("wrong_type", {"conversations": [{"from": "human", "value": "a", "train": "no"}]}),
    "nothing that is to be learnt": Defect(
        "no_answer", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": False}]}
    ),
    "no turns": Defect("no_answer", {"conversations": []}),
    "a question alone": Defect("no_answer", chat(("human", "a"))),
    "a call that is not JSON": Defect("bad_tool_call", calling("add(1, 2)")),
    "a call without a name": Defect("bad_tool_call", calling('{"arguments": {}}')),
    "a call that is a number": Defect("bad_tool_call", calling("7")),
    "arguments that are not JSON": Defect("bad_tool_call", calling('{"name": "add", "arguments": "1, 2"}')),
    "a call with not a number": Defect("bad_tool_call", calling('{"name": "add", "arguments": {"a": NaN}}')),
    "calls as text": Defect("bad_tool_call", messages({"role": "assistant", "content": "", "tool_calls": "add"})),
    "tools that are not JSON": Defect("bad_tools", calling(json.dumps(CALL), tools="add, subtract")),
    "tools as an object": Defect("bad_tools", calling(json.dumps(CALL), tools={"name": "add"})),
    "tools as text in a list": Defect("bad_tools", calling(json.dumps(CALL), tools=["add"])),
    "half a character": Defect("broken_text", rb'{"instruction": "a", "output": "b \ud83d"}'),
    "half a character in a call": Defect("broken_text", calling(r'{"name": "add", "arguments": {"a": "\ud83d"}}')),
    "the replacement character": Defect("broken_text", answer("caf\ufffd")),
    "a zero byte": Defect("control_character", answer("b\x00")),
    "an escape sequence": Defect("control_character", answer("\x1b[31mred")),
    "a placeholder": Defect("placeholder", answer("I am {{name}}.")),
    "a placeholder with spaces": Defect("placeholder", {"instruction": "Who is {{ author }}?", "output": "b"}),
    "a turn end in the text": Defect("special_token", answer("b<|im_end|>\n<|im_start|>user\nhi")),
    "a row that was there": Defect("duplicate", {"instruction": "a", "input": "", "output": "b"}),
    "no tools": Defect("no_tool_call", answer("c"), tool_calls=True),
    "tools that nobody calls": Defect(
        "no_tool_call", {**chat(("human", "a"), ("gpt", "b")), "tools": json.dumps([CALL])}, tool_calls=True
    ),
}


@pytest.fixture(scope="module")
def template(chatml: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(chatml)


def look(folder: Path, name: str, template: ChatTemplate, form: str = "auto", tool_calls: bool = False) -> Tally:
    """What is counted when the rows of one file pass."""
    options = {"tool_calls": {"system_prompt": "Call."}} if tool_calls else {}
    recipe = DataRecipe.model_validate({"rows": [{"source": "local", "path": "."}], "format": form, **options})
    raw = DataSnapshot(path=folder, rows=(DataFile(name=name, source="test", bytes=1),))
    tally = Tally()
    for _ in Candidates(recipe, 1, template, Earlier(None), tally).of(raw):
        pass
    return tally


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_gets_its_reason_its_place_and_a_remedy(name: str, template: ChatTemplate, tmp_path: Path):
    code, row, form, tool_calls = ROWS[name]
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    (tmp_path / "rows.jsonl").write_bytes(GOOD + line + b"\n")
    tally = look(tmp_path, "rows.jsonl", template, form, tool_calls)
    found = {problem: drop.example for problem, drop in tally.drops.items() if drop.example.row == 2}
    if tool_calls:  # the good row calls nothing either and is the first example
        assert tally.dropped == {code: 2}
    else:
        assert list(found) == [code]
        assert f"rows.jsonl:2 ({found[code].detail})" in tally.table()
    assert REASONS[code].remedy in tally.table()


FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("rows.jsonl", b"", "is empty; it must hold at least one row"),
    "nothing but white space": ("rows.jsonl", b"\n \n\n", "holds no rows; it must hold at least one"),
    "an empty list": ("rows.json", b"[]", "holds no rows"),
    "one object": ("rows.json", b'{"instruction": "a"}', "line 1, column 1: a .json file holds one list"),
    "lines named .json": ("rows.json", GOOD * 2, r"name it \.jsonl"),
    "a list that ends early": ("rows.json", b'[\n{"a": 1},\n{"b"', "line 3, column 5"),
    "a list that is not closed": ("rows.json", b'[{"a": 1}', "the file ends inside the list"),
    "a comma too many": ("rows.json", b'[{"a": 1},]', "a comma stands before the end of the list"),
    "a comma too few": ("rows.json", b'[{"a": 1}\n{"a": 2}]', "line 2, column 1: `,` was expected"),
    "more after the list": ("rows.json", b"[1]\n[2]", "line 2, column 1: something follows the end of the list"),
    "a list with not a number": ("rows.json", b'[{"a": NaN}]', "NaN is not JSON"),
    "a list in GBK": ("rows.json", '[{"a": "你好"}]'.encode("gbk"), "is not UTF-8: byte 0xc4"),
    "UTF-16": ("rows.json", '[{"a": 1}]'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "a spreadsheet": ("rows.xlsx", b"PK", r"ends in \.xlsx; rows are read from \.json"),
    "no suffix": ("rows", GOOD, "ends in no suffix"),
    "a broken gzip": ("rows.jsonl.gz", gzip.compress(GOOD * 99)[:-20], "cannot be read as jsonl"),
    "text named .gz": ("rows.jsonl.gz", GOOD, "cannot be read as jsonl"),
    "text named .zst": ("rows.jsonl.zst", GOOD, "cannot be read as jsonl"),
    "text named .parquet": ("rows.parquet", GOOD, "cannot be read as parquet"),
    "a header alone": ("rows.csv", b"instruction,output\n", "holds no rows"),
    "a field too many": ("rows.csv", b"instruction,output\na,b\na,b,c\n", "line 3: the header has 2 fields"),
    "a field too few": ("rows.csv", b"instruction,output\na\n", "line 2: the header has 2 fields"),
    "a quote that stays open": ("rows.csv", b'instruction,output\n"a,b\n', "unexpected end of data"),
    "CSV in Latin-1": ("rows.csv", "instruction,output\nZürich,b\n".encode("latin-1"), "is not UTF-8: byte 0xfc"),
    "a bad line": (
        "rows.jsonl",
        GOOD + b"{\n",
        r"rows\.jsonl, line 2: Expecting .* at column 1; correct",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_place_and_remedy(name: str, tmp_path: Path):
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        inspect(tmp_path / file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="is not a file; check the path"):
        inspect(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "compress"),
    [("rows.json", bytes), ("rows.json.gz", gzip.compress), ("rows.json.zst", lambda b: zstd(b)), ("ROWS.JSON", bytes)],
)
def test_a_list_is_read_plain_and_compressed_and_with_a_byte_order_mark(name: str, compress: Any, tmp_path, template):
    rows = [{"instruction": f"{at} 你好\n", "output": "b"} for at in range(50)]
    (tmp_path / name).write_bytes(compress(b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode()))
    inspect(tmp_path / name)
    tally = look(tmp_path, name, template)
    assert (tally.read, tally.dropped) == (50, {})


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def test_csv_and_parquet_give_the_same_rows(tmp_path: Path, template: ChatTemplate):
    rows = [{"instruction": f'say "{at}",\nplease', "output": "b"} for at in range(50)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        inspect(tmp_path / name)
        tally = look(tmp_path, name, template)
        assert (tally.read, tally.dropped) == (50, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "conversations",
                    "messages",
                    "instruction",
                    "input",
                    "output",
                    "history",
                    "system",
                    "tools",
                    "text",
                    "from",
                    "value",
                    "role",
                    "content",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "prompt",
                    "completion",
                ]
            )
            | st.text(max_size=4),
            inner | st.sampled_from(["human", "gpt", "user", "assistant", "function_call", "[]", "{}", "[{}]"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(JSON, min_size=1, max_size=5), tool_calls=st.booleans())
def test_random_nested_json_never_crashes(rows: list[Any], tool_calls: bool, template, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = look(tmp_path, "rows.jsonl", template, tool_calls=tool_calls)
    assert tally.read == len(rows)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), name=st.sampled_from(["r.json", "r.jsonl", "r.csv", "r.parquet", "r.jsonl.gz"]))
def test_random_bytes_are_read_or_refused_with_a_message(data: bytes, name: str, tmp_path):
    (tmp_path / name).write_bytes(data)
    try:
        inspect(tmp_path / name)
    except DataError as error:
        assert name in str(error)
