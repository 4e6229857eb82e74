"""Answers of a hub that lies: names that climb, numbers that are none, content that is not what was promised."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qlora_core.events import ignore
from qlora_core.hub.resolve import fetch_data, resolve
from qlora_core.recipe import HubSource

COMMIT = "1" * 40
CONTENT = b"{}"
SHA = hashlib.sha1(b"blob 2\0{}").hexdigest()


def file(path: Any, size: Any = 2, **more: Any) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": size, "oid": SHA, **more}


GOOD = [file("config.json"), file("model.safetensors"), file("tokenizer.json")]
TREES: dict[str, Any] = {
    "a name that climbs": [*GOOD, file("../../../evil.json")],
    "a name that climbs below a folder": [*GOOD, file("additional_chat_templates/../../../evil.jinja")],
    "an absolute name": [*GOOD, file("/tmp/evil.json")],
    "a name with backslashes": [*GOOD, file("..\\..\\evil.json")],
    "a name with a zero byte": [*GOOD, file("a\0.json")],
    "a name of 100,000 characters": [*GOOD, file("x" * 100_000 + ".json")],
    "no name": [*GOOD, file("")],
    "a name that is a number": [*GOOD, file(7)],
    "a name with markup": [*GOOD, file("<script>.json")],
    "the same name twice": [*GOOD, *GOOD],
    "100,000 files": [*GOOD, *(file(f"{n}.json") for n in range(100_000))],
    "a size of 2^62": [file("config.json", 2**62), *GOOD[1:]],
    "a size below nothing": [file("config.json", -1), *GOOD[1:]],
    "a size that is a text": [file("config.json", "many"), *GOOD[1:]],
    "a digest that is none": [file("config.json", lfs={"oid": "../../x", "size": 2, "pointerSize": 1}), *GOOD[1:]],
    "a wrong digest": [file("config.json", lfs={"oid": "0" * 64, "size": 2, "pointerSize": 1}), *GOOD[1:]],
    "pickles alone": [file("pytorch_model.bin"), file("rows.pkl")],
    "no list": {"a": 1},
    "null": None,
    "a text": "evil",
    "an empty list": [],
    "an entry that is none": [7, None, "x"],
}
INFOS: dict[str, Any] = {
    "a commit that climbs": {"id": "a/b", "sha": "../../../evil", "siblings": []},
    "a commit that is a number": {"id": "a/b", "sha": 7, "siblings": []},
    "no commit": {"id": "a/b", "siblings": []},
    "information that is a list": [],
    "information that is null": None,
    "information nested without end": "NESTED",
    "information that is no JSON": "BROKEN",
}


class _Liar(BaseHTTPRequestHandler):
    server: "_Hub"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None: ...

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if "/resolve/" in path:
            self._send(CONTENT, {"ETag": f'"{SHA}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            self._send(json.dumps(self.server.tree).encode())
        else:
            texts = {"NESTED": b"[" * 100_000, "BROKEN": b"{"}
            info = self.server.info
            self._send(texts[info] if isinstance(info, str) else json.dumps(info).encode())

    def _send(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Hub(ThreadingHTTPServer):
    daemon_threads = True
    tree: Any = GOOD
    info: Any = None


def inputs(folder: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    hub = _Hub(("127.0.0.1", 0), _Liar)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    info = {"id": "a/b", "sha": COMMIT, "siblings": [], "tags": []}
    for name, tree in TREES.items():
        yield "hub answer", name, lambda place, tree=tree: _fetch(place, hub, tree, info)
    for name, wrong in INFOS.items():
        yield "hub answer", name, lambda place, wrong=wrong: _fetch(place, hub, GOOD, wrong)


def _fetch(place: Path, hub: _Hub, tree: Any, info: Any) -> None:
    from huggingface_hub import constants

    hub.tree, hub.info = tree, info
    constants.ENDPOINT = f"http://127.0.0.1:{hub.server_address[1]}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    source = HubSource(source="huggingface", repo="a/b")
    resolved = resolve(source, "data", place / "downloads")
    fetch_data([resolved], [], place / "downloads", place / "into", ignore)
