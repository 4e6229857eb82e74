"""Models and data sets in a hub's repositories: what is the same for every hub.

A hub's module answers a few questions through its own client (`Hub`). Everything else happens here: a branch is pinned
to a commit, only the files that are needed are fetched, each is checked against the hub's own checksum, and what was
learned is remembered, so that a second run asks nothing and an offline run works.

    <downloads>/<hub>/<role>/<owner>--<name>/refs.json         branch or tag to commit, as last seen
    <downloads>/<hub>/<role>/<owner>--<name>/<commit>.json     the files of a commit, with sizes and checksums
"""

import difflib
import fnmatch
import hashlib
import importlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from pydantic import TypeAdapter

from qlora_core.artifacts import Record
from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import Note, Report
from qlora_core.hub.disk import hash_files, require_space
from qlora_core.hub.network import is_offline
from qlora_core.hub.resolved import Files, Resolved, Role
from qlora_core.hub.select import select_data_files, select_model_files
from qlora_core.recipe import COMMIT, HubSource
from qlora_core.store import write_atomically

HUBS = {"huggingface": "qlora_core.hub.huggingface", "modelscope": "qlora_core.hub.modelscope"}
DEFAULT_REVISION = "the default branch"


class RemoteFile(Record):
    """One file of a repository at a commit."""

    name: str
    bytes: int
    sha256: str | None = None
    git_sha1: str | None = None
    """Of small files that a hub keeps in git itself: SHA-1 of git's blob header and the content."""


SAFE_COMMIT = re.compile(r"\w[\w.-]{0,127}")
LONGEST_NAME_CHARACTERS = 1000
MOST_FILES = 10_000
TREE = TypeAdapter(list[RemoteFile])


class Hub(Protocol):
    """What is asked of a hub, each through its own client; its troubles come back as `SourceError`s."""

    def commit_of(self, source: HubSource, role: Role) -> str:
        """The commit that the source's branch, tag or default branch points to now."""

    def tree(self, source: HubSource, role: Role, commit: str) -> list[RemoteFile]:
        """All files of a commit."""

    def place_of(self, source: HubSource, role: Role, commit: str, name: str, downloads: Path) -> Path | None:
        """Where an earlier download of this file lies, if there was one."""

    def download(
        self,
        source: HubSource,
        role: Role,
        commit: str,
        files: Sequence[RemoteFile],
        downloads: Path,
        report: Report,
    ) -> None:
        """Fetch files in parallel, going on where an earlier attempt stopped; `place_of` then finds them."""


def resolve(source: HubSource, role: Role, downloads: Path) -> Resolved:
    """Pin a repository to a commit; alternatives are tried in their order when the first hub cannot give it.

    Raises:
        SourceError: no hub has it, each with its reason.
        SourceUnavailableError: at least one could not be asked, so that a later attempt may succeed.
    """
    problems: list[SourceError] = []
    for candidate in _places(source):
        try:
            commit = _commit_of(candidate, role, downloads)
        except SourceError as problem:
            problems.append(problem)
        else:
            file = f"/{candidate.file}" if candidate.file else ""
            return Resolved(
                source=candidate,
                description=f"{candidate.source} {candidate.repo}@{commit[:12]}",
                revision=commit,
                name=f"{candidate.repo}{file}",
            )
    kind = SourceUnavailableError if any(isinstance(p, SourceUnavailableError) for p in problems) else SourceError
    raise kind("; ".join(str(problem) for problem in problems))


def _places(source: HubSource) -> list[HubSource]:
    """The source and its alternatives, in the order in which they are tried."""
    return [source, *(place for alternative in source.alternatives for place in _places(alternative))]


def model_files(source: HubSource, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The files that a model and its tokenizer are loaded from.

    Raises:
        SourceError: the repository has no safetensors, or sent wrong bytes.
        SourceUnavailableError: the hub broke off too often.
    """
    tree = _tree(source, "model", resolved.revision, downloads)
    names = select_model_files(tree, f"{source.repo} on {source.source}", source.trust_remote_code)
    return _fetch(source, "model", resolved.revision, [tree[name] for name in names], downloads, report)


def list_model_files(source: HubSource, commit: str, downloads: Path) -> list[tuple[RemoteFile, Path | None]]:
    """The same before anything is fetched: each file, and where it lies if it is here already.

    Raises:
        SourceError: the repository has no safetensors.
        SourceUnavailableError: the hub cannot list them now.
    """
    tree, hub = _tree(source, "model", commit, downloads), _hub(source.source)
    names = select_model_files(tree, f"{source.repo} on {source.source}", source.trust_remote_code)
    return [(tree[name], hub.place_of(source, "model", commit, name, downloads)) for name in names]


def data_files(source: HubSource, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The file or files that the recipe names, or all data files.

    Raises:
        SourceError: the repository does not have them, or sent wrong bytes.
        SourceUnavailableError: the hub broke off too often.
    """
    tree = _tree(source, "data", resolved.revision, downloads)
    where = f"{source.repo} on {source.source}"
    named = source.file and (fnmatch.filter(tree, source.file) or [name for name in tree if name == source.file])
    if source.file is not None and not named:
        near = difflib.get_close_matches(source.file, tree, n=5, cutoff=0.3) or sorted(tree)[:5]
        raise SourceError(f"{where} holds no file {source.file}; it has {', '.join(near)}")
    names = sorted(named) if named else select_data_files(tree, where)
    return _fetch(source, "data", resolved.revision, [tree[name] for name in names], downloads, report)


def _commit_of(source: HubSource, role: Role, downloads: Path) -> str:
    if source.revision is not None and COMMIT.match(source.revision):
        return source.revision
    memory = _memory(source, role, downloads) / "refs.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.is_file() else {}
    branch = source.revision or DEFAULT_REVISION
    if is_offline():
        if branch not in known:
            raise SourceUnavailableError(
                f"{branch} of {source.repo} was never looked up on {source.source} from here, and HF_HUB_OFFLINE is "
                "set; unset it once, or pin `revision` to a commit that is here"
            )
        return known[branch]
    commit = _hub(source.source).commit_of(source, role)
    if not SAFE_COMMIT.fullmatch(commit):  # it becomes part of paths
        raise SourceError(f"{source.source} answered {commit[:80]!r} for the commit of {source.repo}, which is none")
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(memory, json.dumps({**known, branch: commit}, indent=1))
    return commit


def _tree(source: HubSource, role: Role, commit: str, downloads: Path) -> dict[str, RemoteFile]:
    """The files of a commit by name, from memory where it was listed before: a commit never changes."""
    memory = _memory(source, role, downloads) / f"{commit}.json"
    if memory.is_file():
        files = TREE.validate_json(memory.read_bytes())
    else:
        _require_online(source, f"the list of files at {commit}")
        files = _hub(source.source).tree(source, role, commit)
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, TREE.dump_json(files).decode())
    for file in files:
        _check_name(file.name, source)
    return {file.name: file for file in files}


def _fetch(
    source: HubSource, role: Role, commit: str, files: Sequence[RemoteFile], downloads: Path, report: Report
) -> Files:
    if len(files) > MOST_FILES:
        raise SourceError(
            f"{source.repo} on {source.source} lists {len(files):,} files; at most {MOST_FILES:,} are taken"
        )
    hub = _hub(source.source)
    here = {file.name: hub.place_of(source, role, commit, file.name, downloads) for file in files}
    missing = [file for file in files if here[file.name] is None]
    if missing:
        _require_online(source, ", ".join(file.name for file in missing[:3]))
        size = sum(file.bytes for file in missing)
        downloads.mkdir(parents=True, exist_ok=True)
        require_space(downloads, size, f"downloading {source.repo}")
        report(Note(message=f"downloading {len(missing)} files, {size / 1e6:,.1f} MB, of {source.repo}"))
        hub.download(source, role, commit, missing, downloads, report)
    places = {file.name: hub.place_of(source, role, commit, file.name, downloads) for file in files}
    found = {name: path for name, path in places.items() if path is not None}
    if len(found) < len(files):
        absent = sorted(set(places) - set(found))
        raise SourceUnavailableError(f"{source.source} did not deliver {', '.join(absent[:3])}; run again to go on")
    _verify(source, files, found, downloads, report)
    return found


def _verify(source: HubSource, files: Sequence[RemoteFile], places: Files, downloads: Path, report: Report) -> None:
    """Compare every file with the hub's own checksum; a wrong one is removed so that it is fetched again."""
    large = [file for file in files if file.sha256 is not None]
    digests = dict(
        zip(
            (file.name for file in large),
            hash_files([places[file.name].resolve() for file in large], downloads, report),
            strict=True,
        )
    )
    for file in files:
        place = places[file.name]
        wrong = place.stat().st_size != file.bytes or digests.get(file.name, file.sha256) != file.sha256
        if wrong or (file.git_sha1 is not None and _git_sha1(place) != file.git_sha1):
            place.resolve().unlink()
            place.unlink(missing_ok=True)
            raise SourceError(
                f"{file.name} of {source.repo} is not what {source.source} says it is (wrong size or checksum); it was "
                "thrown away, run again to fetch it anew. If it stays so, something on the way alters files"
            )


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _check_name(name: str, source: HubSource) -> None:
    path = PurePosixPath(name)
    is_long = len(name) > LONGEST_NAME_CHARACTERS
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name or is_long or not name.isprintable():
        raise SourceError(f"{source.repo} on {source.source} lists a file named {name[:80]!r}, which is no safe path")


def _require_online(source: HubSource, what: str) -> None:
    if is_offline():
        raise SourceUnavailableError(
            f"{what} of {source.repo} is not here, and HF_HUB_OFFLINE forbids asking {source.source}; unset it"
        )


def _memory(source: HubSource, role: Role, downloads: Path) -> Path:
    return downloads / source.source / role / source.repo.replace("/", "--")


def _hub(name: str) -> Hub:
    try:
        hub: Hub = importlib.import_module(HUBS[name]).HUB
    except ImportError as error:
        raise SourceError(
            f"source: {name} needs a client library that is not installed ({error.name}); "
            f"install it with: pip install 'qlora-flows[{name}]'"
        ) from error
    return hub


def explain_refusal(source: HubSource, token_name: str) -> SourceError:
    """What to tell about a repository that a hub does not let us read."""
    state = f"the token in {token_name} may not read it" if os.environ.get(token_name) else f"{token_name} is not set"
    return SourceError(
        f"{source.source} does not let us read {source.repo}: it is private or gated, or its name is wrong; {state}. "
        f"Accept its terms on its page if it has any, and set {token_name} to a token of an account that may read it"
    )


def explain_absence(source: HubSource, role: Role, near: Sequence[str]) -> SourceError:
    """What to tell about a repository or revision that does not exist, with names that do."""
    what = "model" if role == "model" else "data set"
    revision = f" at revision {source.revision}" if source.revision else ""
    close = difflib.get_close_matches(source.repo, near, n=5, cutoff=0.4) or list(near)[:5]
    hint = f"; there are {', '.join(close)}" if close else ""
    return SourceError(f"{source.source} has no {what} {source.repo}{revision}{hint}; check `repo` and `revision`")
