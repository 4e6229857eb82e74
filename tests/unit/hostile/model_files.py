"""GGUF headers, model folders, adapters and archives."""

import io
import json
import os
import pickle
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from qlora_core.events import ignore
from qlora_core.hub.archive import extract
from qlora_core.hub.gguf_header import read_header
from qlora_core.hub.resolve import resolve
from qlora_core.hub.snapshot import build
from qlora_core.merging.adapter import read_changes
from qlora_core.recipe import LocalSource
from tests.tiny import write_model

Read = Callable[[Path], object]
HUGE = 2**62


class Evil:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


def inputs(folder: Path) -> Iterator[tuple[str, str, Read]]:
    model = write_model(folder / "model")
    for name, content in GGUF.items():
        yield "GGUF header", name, lambda place, content=content: _gguf(place, content)
    for name, file, content in _folders(model):
        yield "model folder", name, lambda place, f=file, c=content: _folder(place, model, f, c)
    for name, change in LINKS.items():
        yield "model folder", name, lambda place, change=change: _linked(place, model, change)
    for name, config, weights in _adapters():
        yield "adapter", name, lambda place, c=config, w=weights: _adapter(place, c, w)
    for name, content, member in ARCHIVES():
        yield "archive", name, lambda place, c=content, m=member: _archive(place, c, m)


def _gguf_of(tensors: int = 0, pairs: int = 0, body: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs) + body + bytes(32)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


GGUF = {
    "nothing": b"",
    "the magic alone": b"GGUF",
    "another magic": _gguf_of(magic=b"GGML"),
    "version 1": _gguf_of(version=1),
    "version 2^32 - 1": _gguf_of(version=2**32 - 1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(32),
    "2^62 tensors": _gguf_of(tensors=HUGE),
    "2^62 pairs": _gguf_of(pairs=HUGE),
    "100,000 tensors that are not there": _gguf_of(tensors=100_000),
    "10,000 pairs that are not there": _gguf_of(pairs=10_000),
    "a string of 2^62 bytes": _gguf_of(pairs=1, body=struct.pack("<Q", HUGE)),
    "a string of 2^20 bytes that are not there": _gguf_of(pairs=1, body=struct.pack("<Q", 2**20)),
    "a key that is no text": _gguf_of(pairs=1, body=_text(b"\xff\xfe") + struct.pack("<II", 4, 1)),
    "a value of type 99": _gguf_of(pairs=1, body=_text(b"k") + struct.pack("<I", 99)),
    "an array of 2^62": _gguf_of(pairs=1, body=_text(b"k") + struct.pack("<IIQ", 9, 0, HUGE)),
    "an array of 4,000,000 that are not there": _gguf_of(
        pairs=1, body=_text(b"k") + struct.pack("<IIQ", 9, 8, 4_000_000)
    ),
    "an array of arrays": _gguf_of(pairs=1, body=_text(b"k") + struct.pack("<IIQ", 9, 9, 10)),
    "2^31 dimensions": _gguf_of(tensors=1, body=_text(b"t") + struct.pack("<I", 2**31)),
    "2^80 elements": _gguf_of(tensors=1, body=_text(b"t") + struct.pack("<IQQ", 2, 2**40, 2**40)),
    "a name that climbs": _gguf_of(tensors=1, body=_text(b"../../x") + struct.pack("<IQIQ", 1, 1, 0, 0)),
    "the same tensor twice": _gguf_of(tensors=2, body=(_text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2),
    "a zip": b"PK\x03\x04" + bytes(100),
    "noise": bytes((n * 7919) % 256 for n in range(5000)),
}


def _gguf(place: Path, content: bytes) -> None:
    (place / "a.gguf").write_bytes(content)
    read_header(place / "a.gguf")


def _tensors_of(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(64)


def _folders(model: Path) -> Iterator[tuple[str, str, bytes]]:
    config = json.loads((model / "config.json").read_text())
    entry = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    weights = "model.safetensors"
    yield "a safetensors header of 2^62 bytes", weights, _tensors_of(b"{}", HUGE)
    yield "a safetensors header of 100 MB that is not there", weights, _tensors_of(b"{}", 100_000_000)
    yield "a safetensors header that is no JSON", weights, _tensors_of(b"{x")
    yield "a safetensors header that is a list", weights, _tensors_of(b"[1]")
    yield "a safetensors header nested without end", weights, _tensors_of(b'{"a":' * 5000)
    yield (
        "offsets beyond the file",
        weights,
        _tensors_of(json.dumps({"a": {**entry, "data_offsets": [0, HUGE]}}).encode()),
    )
    yield (
        "offsets that run backwards",
        weights,
        _tensors_of(json.dumps({"a": {**entry, "data_offsets": [64, 0]}}).encode()),
    )
    yield "a shape of 2^62", weights, _tensors_of(json.dumps({"a": {**entry, "shape": [HUGE, HUGE]}}).encode())
    yield "a shape below nothing", weights, _tensors_of(json.dumps({"a": {**entry, "shape": [-1, 4]}}).encode())
    yield "a shape that is a text", weights, _tensors_of(json.dumps({"a": {**entry, "shape": "x"}}).encode())
    yield "a type that is none", weights, _tensors_of(json.dumps({"a": {**entry, "dtype": "EVIL"}}).encode())
    yield "an entry that is none", weights, _tensors_of(json.dumps({"a": 1}).encode())
    yield "empty weights", weights, b""
    yield "a pickle by another name", weights, pickle.dumps(Evil())
    for key, value in (
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "many"),
        ("num_hidden_layers", -1),
        ("hidden_size", 10**15),
        ("hidden_size", None),
        ("vocab_size", 2**62),
        ("vocab_size", [1]),
        ("model_type", "../../evil"),
        ("model_type", ["llama"]),
        ("model_type", "bert"),
        ("auto_map", {"AutoConfig": "evil--code.Config"}),
        ("auto_map", {"AutoConfig": "../../evil.Config"}),
        ("auto_map", [[["x--y"]]]),
        ("quantization_config", {"quant_method": "gptq", "bits": 10**9}),
        ("quantization_config", "gptq"),
        ("quantization_config", {"quant_method": "__import__('os')"}),
        ("rope_scaling", {"rope_type": "evil", "factor": 1e308}),
        ("dtype", "os.system"),
        ("max_position_embeddings", 10**18),
        ("eos_token_id", -5),
    ):
        yield f"config with {key} = {value!r}", "config.json", json.dumps({**config, key: value}).encode()
    for name, content in {
        "no JSON": b"{",
        "nothing": b"",
        "a list": b"[]",
        "null": b"null",
        "no UTF-8": b"\xff",
        "nested without end": b"[" * 100_000,
        "a number of 10,000 digits": b'{"model_type": "llama", "num_hidden_layers": ' + b"9" * 10_000 + b"}",
    }.items():
        yield f"config: {name}", "config.json", content
        yield f"tokenizer: {name}", "tokenizer.json", content
    for name, template in {
        "a chat template that opens files": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "a chat template without end": "{% for a in range(10**9) %}x{% endfor %}",
        "a chat template of 2^40 characters": "{{ 'x' * (2**40) }}",
        "a chat template that is none": "{% for",
    }.items():
        yield name, "chat_template.jinja", template.encode()
    index = {"weight_map": {"a": "../../../etc/passwd"}}
    yield "an index that climbs", "model.safetensors.index.json", json.dumps(index).encode()
    yield "an index that is none", "model.safetensors.index.json", b"[]"


def _folder(place: Path, model: Path, file: str, content: bytes) -> None:
    folder = _copy(model, place / "model")
    (folder / file).write_bytes(content)
    _open(folder, place)


def _copy(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _open(folder: Path, place: Path) -> None:
    resolved = resolve(LocalSource(source="local", path=folder), "model", place / "downloads")
    build({"into": str(folder), "gguf": None, "source": "x", "revision": resolved.revision}, ignore)


LINKS: dict[str, Callable[[Path], object]] = {
    "weights that are a link to a device": lambda folder: _link(folder / "model.safetensors", "/dev/zero"),
    "a config that is a link to a secret": lambda folder: _link(folder / "config.json", "/etc/shadow"),
    "a config that is a link to itself": lambda folder: _link(folder / "config.json", "config.json"),
    "a folder that is a link to its parent": lambda folder: (folder / "more").symlink_to(folder),
    "weights that are a folder": lambda folder: _as_folder(folder / "model.safetensors"),
    "weights as a pickle alone": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
}


def _link(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _linked(place: Path, model: Path, change: Callable[[Path], object]) -> None:
    folder = _copy(model, place / "model")
    change(folder)
    _open(folder, place)


def _adapters() -> Iterator[tuple[str, bytes, bytes]]:
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = save({f"{prefix}A.weight": torch.ones(4, 8), f"{prefix}B.weight": torch.ones(8, 4)})
    for name, config in {
        "no JSON": b"{",
        "a list": b"[]",
        "null": b"null",
        "no UTF-8": b"\xff",
        "nested without end": b"[" * 100_000,
        "another kind": json.dumps({**good, "peft_type": "EVIL"}).encode(),
        "a rank of nothing": json.dumps({**good, "r": 0}).encode(),
        "a rank that is a text": json.dumps({**good, "r": "x"}).encode(),
        "alpha that is a list": json.dumps({**good, "lora_alpha": [1]}).encode(),
        "a pattern without end": json.dumps({**good, "rank_pattern": {"(a+)+$": 4}}).encode(),
        "a pattern that is a number": json.dumps({**good, "rank_pattern": 7}).encode(),
        "code of its own": json.dumps({**good, "auto_mapping": {"x": "os"}, "evil": "__import__('os')"}).encode(),
        "bias that is none": json.dumps({**good, "bias": 99}).encode(),
    }.items():
        yield f"config: {name}", config, tensors
    config = json.dumps(good).encode()
    for name, weights in {
        "nothing": b"",
        "a pickle": pickle.dumps(Evil()),
        "a header of 2^62 bytes": _tensors_of(b"{}", HUGE),
        "NaN": save({f"{prefix}A.weight": torch.full((4, 8), torch.nan)}),
        "names that climb": save(
            {"../../x.lora_A.weight": torch.ones(4, 8), "../../x.lora_B.weight": torch.ones(8, 4)}
        ),
        "no tensors": save({}),
        "an empty tensor": save({f"{prefix}A.weight": torch.ones(0, 8)}),
    }.items():
        yield f"weights: {name}", config, weights


def _adapter(place: Path, config: bytes, weights: bytes) -> None:
    (place / "adapter_config.json").write_bytes(config)
    (place / "adapter_model.safetensors").write_bytes(weights)
    read_changes(place, {}, tied=False)


def ARCHIVES() -> Iterator[tuple[str, bytes, str]]:  # noqa: N802
    for member in ("../../x", "/etc/passwd", "a/../../x", "a\\..\\x", "", ".", "a\0b", "missing"):
        yield f"a zip, asked for {member!r}", _zip({"a": b"x"}), member
    yield "a zip with names that climb", _zip({"../../x": b"x", "a": b"x"}), "a"
    yield "a zip with a link", _zip({"a": b"/etc/passwd"}, stat.S_IFLNK | 0o777), "a"
    yield "a zip cut in the middle", _zip({"a": b"x" * 10_000})[:100], "a"
    yield "a zip with a wrong checksum", _zip({"a": b"x" * 1000}).replace(b"xxxx", b"yyyy", 1), "a"
    yield "a tar with names that climb", _tar("../../x"), "x"
    yield "a tar with a link", _tar("top/a", tarfile.SYMTYPE, "/etc/passwd"), "a"
    yield "a tar with a hard link", _tar("top/a", tarfile.LNKTYPE, "/etc/passwd"), "a"
    yield "a tar with a device", _tar("top/a", tarfile.CHRTYPE), "a"
    yield "a tar that claims 2^60 bytes", _tar("top/a", size=2**60), "a"
    yield "noise", bytes(range(256)) * 10, "a"
    yield "nothing", b"", "a"


def _zip(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, content)
    return into.getvalue()


def _tar(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> bytes:
    import gzip

    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, size
    return gzip.compress(entry.tobuf() + bytes(1024))


def _archive(place: Path, content: bytes, member: str) -> None:
    (place / "archive").write_bytes(content)
    extract(place / "archive", member, place / "target")
