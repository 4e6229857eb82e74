"""Reading a header that may be hostile."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.errors import SourceError
from qlora_core.hub.gguf_header import read_header


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "a.gguf"
        path.write_bytes(content)
        return path

    return write


def header(tensors: int = 0, pairs: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def test_metadata_and_shapes_are_read(tmp_path, make_gguf):
    tensors = make_gguf(tmp_path / "a.gguf")
    found = read_header(tmp_path / "a.gguf")
    assert found.metadata["tokenizer.ggml.pre"] == "smollm"
    assert found.metadata["llama.block_count"] == 2
    assert found.shapes == {name: tensor.shape[::-1] for name, tensor in tensors.items()}


ABSURD = {
    "tensors": header(tensors=2**60),
    "metadata entries": header(pairs=2**60),
    "bytes in a string": header(pairs=1, body=struct.pack("<Q", 2**62)),
    "items in an array": header(pairs=1, body=string("k") + struct.pack("<IIQ", 9, 0, 2**61)),
    "dimensions in a tensor": header(tensors=1, body=string("t") + struct.pack("<I", 2**31)),
    "elements in t": header(tensors=1, body=string("t") + struct.pack("<IQQ", 2, 2**40, 2**40) + b"\0" * 12),
}


@pytest.mark.parametrize("what", ABSURD)
def test_an_absurd_count_is_refused(write, what):
    with pytest.raises(SourceError, match=rf"claims [\d,]+ {what}; at most"):
        read_header(write(ABSURD[what] + b"\0" * 32))


def test_another_kind_of_file_is_refused(write):
    with pytest.raises(SourceError, match=r"a GGUF file of version 2 or 3 is needed"):
        read_header(write(b"PK\x03\x04" + b"\0" * 40))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_a_source_error_and_nothing_else(write, make_gguf, tmp_path, data):
    intact = tmp_path / "intact.gguf"
    if not intact.exists():
        make_gguf(intact)
    content = bytearray(intact.read_bytes()[: data.draw(st.integers(0, 9000))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_header(write(bytes(content)))
    except SourceError as error:
        assert "a.gguf" in str(error)
