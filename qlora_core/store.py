"""The artifact store: fingerprint to directory.

    <root>/<stage>/<fingerprint>/           a whole artifact: its files and, written last, manifest.json
    <root>/work/<stage>-<fingerprint>/      one in the making; kept after a crash so that the stage can resume
    <root>/trash/<random>/                  one being removed
    <root>/locks/<stage>-<fingerprint>.lock

An artifact becomes visible by one rename of a directory that holds its files and its manifest, and disappears by one
rename into the trash, so a directory below a stage is always whole. That gives caching, resuming, "nothing has
changed" and lineage by one rule.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel

from qlora_core.artifacts import Artifact
from qlora_core.errors import StoreError

MANIFEST = "manifest.json"
WHOLE = ".whole"
"""In a work directory: the artifact, complete but for its rename."""
EVERYTHING = ("**/*",)
A = TypeVar("A", bound=Artifact)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces), in hex; pydantic models are dumped first."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(stage: str, version: int, recipe: Any, inputs: Mapping[str, str]) -> str:
    """What identifies the output of a stage before it is made.

    Args:
        stage: its name.
        version: the stage's own number, raised when its code makes something else from the same input.
        recipe: the part of the recipe that decides the output.
        inputs: digests of the artifacts that it reads, by role.
    """
    return sha256_of_json({"stage": stage, "version": version, "recipe": recipe, "inputs": dict(inputs)})


def digest_of_folder(folder: Path) -> str:
    """SHA-256 over the names and SHA-256s of the files below a folder, in hex."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return sha256_of_json({file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files})


class Store:
    """The artifact store below one root directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def find(self, kind: type[A], stage: str, key: str) -> A | None:
        """The artifact of a stage with this fingerprint, or None; file sizes are compared with the manifest.

        Its manifest gets the time of this use, which is what a clean-up goes by.

        Raises:
            StoreError: it is there but was altered.
        """
        found = self._load(kind, stage, key)
        if found is not None:
            with suppress(OSError):  # a store that may only be read
                os.utime(found.path / MANIFEST)
        return found

    def newest(self, kind: type[A], stage: str) -> Iterator[A]:
        """The artifacts of a stage, last used or made first; altered ones are left out, and none counts as used."""
        manifests = (self.root / stage).glob(f"*/{MANIFEST}")
        for manifest in sorted(manifests, key=_changed_s, reverse=True):
            try:
                found = self._load(kind, stage, manifest.parent.name)
            except StoreError:
                continue
            if found is not None:
                yield found

    def find_digest(self, kind: type[A], stage: str, digest: str) -> A | None:
        """The artifact of a stage whose content has this digest, or None."""
        for manifest in sorted((self.root / stage).glob(f"*/{MANIFEST}")):
            with suppress(FileNotFoundError):  # removed by a clean-up meanwhile
                if json.loads(manifest.read_text())["record"]["digest"] == digest:
                    return self.find(kind, stage, manifest.parent.name)
        return None

    def obtain(
        self, kind: type[A], stage: str, key: str, produce: Callable[[Path], A], keep: tuple[str, ...] = EVERYTHING
    ) -> A:
        """Find the artifact with this fingerprint, or have it made in a work directory and commit it."""
        with self.workspace(stage, key) as work:
            return self.find(kind, stage, key) or self.commit(produce(work), stage, key, keep)

    @contextmanager
    def workspace(self, stage: str, key: str) -> Iterator[Path]:
        """Hold the lock of a fingerprint and yield its work directory, with what an earlier attempt left in it.

        A second process that asks for the same fingerprint waits here, and finds the artifact afterwards.
        """
        from filelock import FileLock

        place, locks = self._place(stage, key), self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{stage}-{key}.lock"):
            folder = self.root / "work" / f"{stage}-{key}"
            folder.mkdir(parents=True, exist_ok=True)
            discard(folder / WHOLE)
            yield folder
            if folder.is_dir() and ((place / MANIFEST).is_file() or not any(folder.iterdir())):
                self.remove(folder)

    def commit(self, artifact: A, stage: str, key: str, keep: tuple[str, ...] = EVERYTHING) -> A:
        """Turn a work directory into an artifact: hash its files, write the manifest, rename.

        The work directory stays whole until the rename is done: whoever is killed before goes on from its checkpoints.

        Args:
            artifact: the record, its `path` still the work directory.
            stage: name of the stage.
            key: its fingerprint.
            keep: `Path.glob` patterns of the files that belong to the artifact (`model/**/*`); all others are removed.
        """
        work, place = artifact.path, self._place(stage, key)
        whole = _gather(work, keep)
        files = {
            file.relative_to(whole).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
            for file in sorted(whole.rglob("*"))
            if file.is_file() and file.name != MANIFEST
        }
        digest = sha256_of_json({name: entry["sha256"] for name, entry in files.items()})
        stored = artifact.model_copy(update={"path": place, "digest": digest, "fingerprint": key})
        record = stored.model_dump(mode="json", exclude={"path"})
        write_atomically(whole / MANIFEST, json.dumps({"stage": stage, "record": record, "files": files}, indent=1))
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not (place / MANIFEST).is_file():  # a removal that was cut short
            self.remove(place)
        whole.rename(place)
        _sync(place.parent)
        self.remove(work)
        return stored

    def remove(self, folder: Path) -> None:
        """Remove a directory of the store: by one rename out of sight, then file by file."""
        trash = self.root / "trash"
        trash.mkdir(parents=True, exist_ok=True)
        doomed = trash / uuid4().hex
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return
        except OSError:  # on another disk than the store
            doomed = folder
        discard(doomed)

    def empty_trash(self) -> None:
        """Remove what removals that were cut short have left."""
        for doomed in (self.root / "trash").glob("*"):
            discard(doomed)

    def _load(self, kind: type[A], stage: str, key: str) -> A | None:
        folder = self._place(stage, key)
        if not (folder / MANIFEST).is_file():
            return None
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise StoreError(
                    f"{file} is missing or was altered after it was stored; remove {folder} and run again to remake it"
                )
        return kind.model_validate({**manifest["record"], "path": folder})

    def _place(self, stage: str, key: str) -> Path:
        if not (len(key) == 64 and all(c in "0123456789abcdef" for c in key)):
            raise StoreError(f"{key!r} is no fingerprint; it must be the 64 hex digits that `fingerprint` returns")
        return self.root / stage / key


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _gather(work: Path, keep: tuple[str, ...]) -> Path:
    """A directory in `work` that shares its blocks with the files to keep, which stay where they are too."""
    whole = work / WHOLE
    discard(whole)
    kept = {file for pattern in keep for file in work.glob(pattern) if not file.is_dir() or file.is_symlink()}
    whole.mkdir()
    for file in sorted(kept - {work / MANIFEST}):
        target = whole / file.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target, follow_symlinks=False)
        except OSError:  # a file system without hard links
            file.rename(target)
    return whole


def _changed_s(path: Path) -> float:
    """When a file was changed last, in seconds since 1970; 0 for one that was just removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def discard(folder: Path) -> None:
    """Remove a directory that is not needed any more; one that is gone already is fine."""
    shutil.rmtree(folder, ignore_errors=True)
