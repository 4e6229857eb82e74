"""ModelScope, through modelscope_hub: `MODELSCOPE_ENDPOINT` and `MODELSCOPE_API_TOKEN` are obeyed.

Its file listing gives every file's SHA-256 and the commit that last changed it. The newest of these commits stands for
the whole repository, as the hub does not name the head of a branch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from modelscope_hub import HubApi, HubConfig
from modelscope_hub.errors import (
    AuthenticationError,
    FileDownloadError,
    FileIntegrityError,
    HubError,
    NetworkError,
    NotExistError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
)

from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import Progress, Report
from qlora_core.hub.network import BusyError, patiently
from qlora_core.hub.repository import RemoteFile, explain_absence, explain_refusal
from qlora_core.hub.resolved import Role
from qlora_core.recipe import COMMIT, HubSource

REPO_TYPES = {"model": "model", "data": "dataset"}
DEFAULT_BRANCH = "master"
WORKERS = 8
REPORT_EVERY_S = 0.5
T = TypeVar("T")


class ModelScope:
    """The questions of `Hub`, answered by modelscope_hub."""

    def commit_of(self, source: HubSource, role: Role) -> str:
        """The newest commit among those that last changed the branch's files."""
        entries = _list(source, role, source.revision or DEFAULT_BRANCH)
        dated = [(entry.get("CommittedDate") or 0, entry.get("Revision") or "") for entry in entries]
        commit = max(dated, default=(0, ""))[1]
        if not COMMIT.match(commit):
            raise SourceError(f"ModelScope names no commit for {source.repo}; it may be empty. Check its page")
        return str(commit)

    def tree(self, source: HubSource, role: Role, commit: str) -> list[RemoteFile]:
        """List a commit."""
        return [
            RemoteFile(name=entry["Path"], bytes=entry["Size"], sha256=entry.get("Sha256") or None)
            for entry in _list(source, role, commit)
        ]

    def place_of(self, source: HubSource, role: Role, commit: str, name: str, downloads: Path) -> Path | None:
        """Look into the folder of the commit; the client names unfinished files differently."""
        path = _folder(source, role, commit, downloads) / name
        return path if path.is_file() else None

    def download(
        self,
        source: HubSource,
        role: Role,
        commit: str,
        files: Sequence[RemoteFile],
        downloads: Path,
        report: Report,
    ) -> None:
        """Fetch into the folder of the commit."""
        folder = _folder(source, role, commit, downloads)
        wanted = [{"Path": file.name, "Size": file.bytes, "Sha256": file.sha256, "Type": "blob"} for file in files]
        counter = _counter(source.repo, sum(file.bytes for file in files), report)
        _ask(
            source,
            role,
            lambda: _api().download_repo(
                source.repo,
                REPO_TYPES[role],
                revision=commit,
                local_dir=folder,
                file_list=wanted,
                max_workers=WORKERS,
                progress_callbacks=[counter],
            ),
        )


HUB = ModelScope()


def _api() -> HubApi:
    return HubApi(HubConfig())


def _list(source: HubSource, role: Role, revision: str) -> list[dict[str, Any]]:
    entries = _ask(
        source, role, lambda: _api().legacy.list_repo_files(source.repo, REPO_TYPES[role], revision=revision)
    )
    return [entry for entry in entries if entry.get("Type") != "tree"]


def _folder(source: HubSource, role: Role, commit: str, downloads: Path) -> Path:
    return downloads / "modelscope" / role / source.repo.replace("/", "--") / commit


def _ask(source: HubSource, role: Role, call: Callable[[], T]) -> T:
    def translated() -> T:
        with _translate(source, role):
            return call()

    return patiently(translated, f"ModelScope, asked for {source.repo}")


@contextmanager
def _translate(source: HubSource, role: Role) -> Iterator[None]:
    """The client's errors as ours: temporary, refused, or not there."""
    try:
        yield
    except FileDownloadError as error:
        with _translate(source, role):
            raise next(iter(error.failed_files.values())) from error
    except (AuthenticationError, PermissionDeniedError) as error:
        raise explain_refusal(source, "MODELSCOPE_API_TOKEN") from error
    except NotExistError as error:
        raise explain_absence(source, role, _neighbours(source, role)) from error
    except FileIntegrityError as error:
        raise SourceError(f"ModelScope sent wrong bytes of {source.repo} ({error.message}); none were kept") from error
    except (RateLimitError, ServerError) as error:
        raise BusyError(f"it answered {error.status_code}", getattr(error, "retry_after", None) or 0.0) from error
    except NetworkError as error:
        raise SourceUnavailableError(
            "ModelScope cannot be reached; try again later, set MODELSCOPE_ENDPOINT to a mirror, or use `source: local`"
        ) from error
    except HubError as error:
        raise SourceUnavailableError(f"ModelScope failed: {error.message}; try {source.repo} again later") from error


def _neighbours(source: HubSource, role: Role) -> list[str]:
    """Repositories of the same owner; a hint is worth one question, and no trouble of its own."""
    try:
        page = _api().list_repos(REPO_TYPES[role], owner=source.repo.partition("/")[0], page_size=100)
        return [repo.repo_id for repo in page.items if repo.repo_id is not None]
    except HubError:
        return []


def _counter(what: str, total_bytes: int, report: Report) -> type:
    """What the client makes one of for every file; together they report the bytes of all files."""
    state = {"done": 0, "told": 0.0}

    class Counter:
        def __init__(self, filename: str, file_size: int) -> None: ...

        def update(self, size: int) -> None:
            state["done"] += size
            if time.monotonic() - state["told"] > REPORT_EVERY_S:
                state["told"] = time.monotonic()
                done = min(int(state["done"]), total_bytes)
                report(Progress(what=what, done=done, total=total_bytes, unit="bytes"))

        def end(self) -> None: ...

    return Counter
