"""Hugging Face, through huggingface_hub: `HF_ENDPOINT` and `HF_TOKEN` are obeyed, files are shared between commits."""

import glob
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from huggingface_hub import HfApi, RepoFile, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from qlora_core.errors import SourceUnavailableError
from qlora_core.events import Progress, Report
from qlora_core.hub.network import BusyError, patiently
from qlora_core.hub.repository import RemoteFile, explain_absence, explain_refusal
from qlora_core.hub.resolved import Role
from qlora_core.recipe import HubSource

REPO_TYPES = {"model": "model", "data": "dataset"}
BUSY = (408, 429, 500, 502, 503, 504)
WORKERS = 8
REPORT_EVERY_S = 0.5
T = TypeVar("T")


class HuggingFace:
    """The questions of `Hub`, answered by huggingface_hub."""

    def commit_of(self, source: HubSource, role: Role) -> str:
        """Ask for the head of a branch or tag."""
        info = _ask(
            source, role, lambda: _api().repo_info(source.repo, revision=source.revision, repo_type=REPO_TYPES[role])
        )
        return str(info.sha)

    def tree(self, source: HubSource, role: Role, commit: str) -> list[RemoteFile]:
        """List a commit, page by page."""
        entries = _ask(
            source,
            role,
            lambda: list(
                _api().list_repo_tree(source.repo, recursive=True, revision=commit, repo_type=REPO_TYPES[role])
            ),
        )
        return [_remote(entry) for entry in entries if isinstance(entry, RepoFile)]

    def place_of(self, source: HubSource, role: Role, commit: str, name: str, downloads: Path) -> Path | None:
        """Look into the client's own cache."""
        found = try_to_load_from_cache(
            source.repo, name, cache_dir=_cache(downloads), revision=commit, repo_type=REPO_TYPES[role]
        )
        return Path(found) if isinstance(found, str) else None

    def download(
        self,
        source: HubSource,
        role: Role,
        commit: str,
        files: Sequence[RemoteFile],
        downloads: Path,
        report: Report,
    ) -> None:
        """Fetch into the client's own cache."""
        total = sum(file.bytes for file in files)
        _ask(
            source,
            role,
            lambda: snapshot_download(
                source.repo,
                repo_type=REPO_TYPES[role],
                revision=commit,
                cache_dir=_cache(downloads),
                allow_patterns=[glob.escape(file.name) for file in files],
                max_workers=WORKERS,
                token=os.environ.get("HF_TOKEN"),
                endpoint=os.environ.get("HF_ENDPOINT"),
                tqdm_class=_bar(source.repo, total, report),
            ),
        )


HUB = HuggingFace()


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN"))


def _cache(downloads: Path) -> Path:
    return downloads / "huggingface" / "cache"


def _remote(entry: RepoFile) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(name=entry.path, bytes=entry.lfs.size, sha256=entry.lfs.sha256)
    return RemoteFile(name=entry.path, bytes=entry.size, git_sha1=entry.blob_id)


def _ask(source: HubSource, role: Role, call: Callable[[], T]) -> T:
    def translated() -> T:
        with _translate(source, role):
            return call()

    return patiently(translated, f"Hugging Face, asked for {source.repo}")


@contextmanager
def _translate(source: HubSource, role: Role) -> Iterator[None]:
    """The client's errors as ours: temporary, refused, or not there."""
    try:
        yield
    except (GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError) as error:
        status = error.response.status_code
        if isinstance(error, RevisionNotFoundError):
            raise explain_absence(source, role, _revisions(source, role)) from error
        if isinstance(error, GatedRepoError) or status in (401, 403):
            raise explain_refusal(source, "HF_TOKEN") from error
        raise explain_absence(source, role, _neighbours(source, role)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in BUSY:
            raise BusyError(f"it answered {status}", _wait_asked(error.response)) from error
        if status in (401, 403):
            raise explain_refusal(source, "HF_TOKEN") from error
        raise SourceUnavailableError(f"Hugging Face answered {status} for {source.repo}; try again later") from error
    except (httpx.ConnectError, LocalEntryNotFoundError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            with _translate(source, role):
                raise error.__cause__ from error
        raise SourceUnavailableError(
            "Hugging Face cannot be reached; try again later, set HF_ENDPOINT to a mirror, or use `source: local`"
        ) from error
    except (httpx.TransportError, OSError) as error:
        raise BusyError(f"the connection broke off ({type(error).__name__})") from error


def _wait_asked(response: httpx.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def _neighbours(source: HubSource, role: Role) -> list[str]:
    """Repositories of the same owner; a hint is worth one question, and no trouble of its own."""
    owner = source.repo.partition("/")[0]
    api = _api()
    found = api.list_models(author=owner, limit=200) if role == "model" else api.list_datasets(author=owner, limit=200)
    return _quietly(lambda: [repo.id for repo in found])


def _revisions(source: HubSource, role: Role) -> list[str]:
    def names() -> list[str]:
        refs = _api().list_repo_refs(source.repo, repo_type=REPO_TYPES[role])
        return [f"revision {ref.name}" for ref in (*refs.branches, *refs.tags)]

    return _quietly(names)


def _quietly(call: Callable[[], list[str]]) -> list[str]:
    try:
        return call()
    except (HfHubHTTPError, httpx.HTTPError, ValueError):
        return []


def _bar(what: str, total_bytes: int, report: Report) -> type[tqdm]:
    """A progress bar for the client that draws nothing and reports the bytes of all files together."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_transfer = options.get("unit") == "B" and str(options.get("desc", "")).startswith("Download")
            self._done, self._told = 0, 0.0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._counts_transfer and time.monotonic() - self._told > REPORT_EVERY_S:
                self._told = time.monotonic()
                report(Progress(what=what, done=min(self._done, total_bytes), total=total_bytes, unit="bytes"))
            return None

    return Bar
