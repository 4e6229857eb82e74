"""A small model hub on loopback that speaks what the clients of Hugging Face and ModelScope ask for, and can misbehave.

Endpoints of Hugging Face: `/api/{models,datasets}`, `/api/.../revision`, `/tree`, `/refs`, and `/{repo}/resolve` with
HEAD, Range, ETag and the commit in a header. Endpoints of ModelScope: `/api/v1/{models,datasets}/.../repo/files`,
`/repo/tree`, `/repo`, and the listing of `/openapi/v1`.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["models", "datasets"]
LARGE_BYTES = 1000
"""Files from this size on count as LFS files, whose SHA-256 the hub names."""


@dataclass
class Commit:
    """One state of a repository; `changed_in` names for each file the commit that last changed it."""

    id: str
    files: dict[str, bytes]
    changed_in: dict[str, str]
    number: int


@dataclass
class Repo:
    """Commits in their order; the last is the head of every branch."""

    commits: list[Commit] = field(default_factory=list)
    token: str | None = None
    """What a reader must show; None lets everybody in."""
    gated: bool = False
    base_model: str | None = None

    def at(self, revision: str) -> Commit | None:
        """A branch's head, or a commit."""
        if revision in ("main", "master"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.id == revision), None)


@dataclass
class Fault:
    """One misbehaviour, served once to the first request whose path holds `path`."""

    path: str
    status: int = 0
    cut_after_bytes: int = 0
    retry_after_s: int | None = None
    method: str = "GET"


class HubServer(ThreadingHTTPServer):
    """The hub; `requests` tells what was asked, `faults` what goes wrong next."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[tuple[Kind, str], Repo] = {}
        self.faults: list[Fault] = []
        self.corrupt: set[str] = set()
        """Names of files of which wrong bytes are sent, in the right number."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path with query, and `Range`."""
        self.delay_s = 0.0
        """How long each file takes to begin."""
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, kind: Kind, name: str, files: dict[str, bytes]) -> str:
        """Add a commit that holds exactly these files and move the branches to it."""
        repo = self.repos.setdefault((kind, name), Repo())
        before = repo.commits[-1] if repo.commits else Commit("", {}, {}, 0)
        number = len(repo.commits) + 1
        identity = hashlib.sha1(f"{kind}{name}{number}".encode()).hexdigest()
        changed_in = {
            file: before.changed_in[file] if before.files.get(file) == content else identity
            for file, content in files.items()
        }
        repo.commits.append(Commit(identity, files, changed_in, number))
        return identity

    def downloads(self, name: str = "") -> list[tuple[str, str | None]]:
        """Path and `Range` of the files that were fetched, whose path holds `name`."""
        return [
            (path, asked)
            for method, path, asked in self.requests
            if method == "GET" and name in path and ("/resolve/" in path or "FilePath=" in path)
        ]

    @contextmanager
    def serving(self, content: str) -> Iterator[None]:
        """Count files that are served at the same time."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.delay_s)
        yield
        with self._lock:
            self._at_once -= 1

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Take the first fault that is meant for this request."""
        with self._lock:
            fault = next((f for f in self.faults if f.method == method and f.path in path), None)
            if fault is not None:
                self.faults.remove(fault)
            return fault


@contextmanager
def running() -> Iterator[HubServer]:
    """A hub on a free port."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def log_message(self, *arguments: Any) -> None: ...

    def _route(self, method: str) -> None:
        self.server.requests.append((method, self.path, self.headers["Range"]))
        self.fault = self.server.next_fault(method, self.path)
        if self.fault is not None and self.fault.status:
            wait = {} if self.fault.retry_after_s is None else {"Retry-After": str(self.fault.retry_after_s)}
            self._json({"error": "busy"}, self.fault.status, wait)
            return
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        elif parts[:2] == ["openapi", "v1"]:
            names = self._names(parts[2], query.get("owner"))
            self._json(
                {"success": True, "data": {parts[2]: [{"id": name} for name in names], "total_count": len(names)}}
            )
        elif parts[0] == "api":
            self._huggingface(parts[1:], query)
        else:
            self._resolve(parts)

    def _names(self, kind: str, owner: str | None) -> list[str]:
        return [name for known, name in self.server.repos if known == kind and name.startswith(f"{owner}/")]

    def _may_read(self, repo: Repo) -> bool:
        return repo.token is None or self.headers["Authorization"] == f"Bearer {repo.token}"

    # Hugging Face

    def _huggingface(self, parts: list[str], query: dict[str, str]) -> None:
        if parts[0] not in ("models", "datasets"):
            self._json({"error": "not served here"}, 404)
            return
        if len(parts) == 1:
            self._json([{"id": name} for name in self._names(parts[0], query.get("author"))])
            return
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        repo = self._readable(kind, name)
        if repo is None:
            return
        if rest == ["refs"]:
            head = repo.commits[-1].id
            branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": head}]
            self._json({"branches": branches, "tags": [], "converts": []})
            return
        commit = repo.at(rest[1] if rest else "main")
        if commit is None:
            self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            self._json([_tree_entry(file, content) for file, content in commit.files.items()])
        else:
            card = {"base_model": repo.base_model} if repo.base_model else {}
            siblings = [{"rfilename": file} for file in commit.files]
            self._json({"id": name, "sha": commit.id, "cardData": card, "siblings": siblings, "tags": []})

    def _readable(self, kind: str, name: str) -> Repo | None:
        repo = self.server.repos.get((kind, name))  # type: ignore[call-overload]
        if repo is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif not self._may_read(repo):
            code = "GatedRepo" if repo.gated else "RepoNotFound"
            self._json({"error": "not for you"}, 403 if repo.gated else 401, {"X-Error-Code": code})
        else:
            return repo
        return None

    def _resolve(self, parts: list[str]) -> None:
        kind: Kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        repo = self._readable(kind, "/".join(parts[:2]))
        if repo is None:
            return
        commit, file = repo.at(parts[3]), "/".join(parts[4:])
        if commit is None or file not in commit.files:
            self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = commit.files[file]
        etag = _sha256(content) if len(content) >= LARGE_BYTES else _git_sha1(content)
        self._file(file, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.id})

    # ModelScope

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        repo = self.server.repos.get((kind, name))  # type: ignore[call-overload]
        commit = repo.at(query.get("Revision", "master")) if repo else None
        if repo is not None and not self._may_read(repo):
            self._json({"Code": 10010205001, "Message": "no permission", "Success": False}, 403)
        elif commit is None:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        elif rest in (["repo", "files"], ["repo", "tree"]):
            entries = [_modelscope_entry(file, commit) for file in commit.files]
            self._json({"Code": 200, "Success": True, "Data": {"Files": entries, "LatestCommitter": {"Id": ""}}})
        else:
            self._file(query["FilePath"], commit.files[query["FilePath"]], {})

    # Both

    def _file(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        if name in self.server.corrupt:
            content = bytes(255 - byte for byte in content)
        asked = self.headers["Range"]
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.cut_after_bytes if self.fault else 0
        with self.server.serving(name):
            self.wfile.write(content[start : start + cut] if cut else content[start:])
        self.close_connection = bool(cut) or self.close_connection

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree_entry(file: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": file, "size": len(content), "oid": _git_sha1(content)}
    if len(content) >= LARGE_BYTES:
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _modelscope_entry(file: str, commit: Commit) -> dict[str, Any]:
    content = commit.files[file]
    return {
        "Name": file.rpartition("/")[2],
        "Path": file,
        "Type": "blob",
        "Size": len(content),
        "Sha256": _sha256(content),
        "Revision": commit.changed_in[file],
        "CommittedDate": commit.number if commit.changed_in[file] == commit.id else 0,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
