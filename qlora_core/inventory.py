"""What lies in the artifact store: sizes, what refers to what, what is needed, and whether it is what was stored."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_core.artifacts import Record
from qlora_core.store import MANIFEST, Store, sha256_of_file

NOT_STAGES = ("work", "locks", "trash")
DAY_S = 86400
ABOUT_OTHERS = {"scores": "model_digest", "match": "quantized_digest"}
"""Stages whose artifacts only say something about another one, and are needed as long as that is."""


class Item(Record):
    """One artifact, or the work of an attempt that has not ended."""

    stage: str
    fingerprint: str
    path: Path
    digest: str = ""
    """Empty for work."""
    refers_to: tuple[str, ...] = ()
    """Digests of the artifacts that it was made from."""
    about: str = ""
    """Digest of the artifact that it says something about."""
    bytes: int
    used_s: float
    """When it was last used, in seconds since 1970."""

    @property
    def lock(self) -> str:
        """Name of the lock that its stage holds while it is made."""
        return f"{self.stage}-{self.fingerprint}"

    def unused_days(self, now_s: float | None = None) -> float:
        """How long ago its last use was; a use in the future, by a clock that was wrong, counts as one just now."""
        return max((now_s or time.time()) - self.used_s, 0.0) / DAY_S


def inventory(store: Store) -> list[Item]:
    """Everything in the store: artifacts by stage, then work; what cannot be read counts as work."""
    manifests = sorted(store.root.glob(f"*/*/{MANIFEST}"))
    stored = [_artifact(manifest) for manifest in manifests if manifest.parent.parent.name not in NOT_STAGES]
    return stored + [_work(folder) for folder in sorted(store.root.glob("work/*"))]


def needed(items: list[Item], roots: Mapping[str, str]) -> dict[Path, tuple[str, ...]]:
    """Why artifacts must stay: folder to reasons.

    Args:
        items: of `inventory`.
        roots: digest or fingerprint of what is needed for its own sake, to who needs it.
    """
    by_digest: dict[str, list[Item]] = {}
    for item in items:
        by_digest.setdefault(item.digest, []).append(item)
    reasons: dict[Path, set[str]] = {}
    for item in items:
        for name in {item.digest, item.fingerprint} & roots.keys():
            _follow(item, roots[name], by_digest, reasons)
    for item in items:
        for about in by_digest.get(item.about, []) if item.about else []:
            if about.path in reasons:
                reasons.setdefault(item.path, set()).update(reasons[about.path])
    return {path: tuple(sorted(why)) for path, why in reasons.items()}


def is_locked(store: Store, item: Item) -> bool:
    """Whether somebody works on it now."""
    lock = store.root / "locks" / f"{item.lock}.lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def damage(item: Item) -> Iterator[str]:
    """What differs from the manifest, a sentence a file; nothing for whole artifacts and for work."""
    if not item.digest:
        return
    try:
        files = json.loads((item.path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        yield f"{item.path / MANIFEST} cannot be read"
        return
    for name, entry in files.items():
        file = item.path / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{file} has {file.stat().st_size:,} bytes and must have {entry['bytes']:,}"
        elif sha256_of_file(file) != entry["sha256"]:
            yield f"{file} was altered"
    known = {*files, MANIFEST}
    for file in sorted(item.path.rglob("*")):
        name = file.relative_to(item.path).as_posix()
        if not file.is_dir() and name not in known and file.name != MANIFEST:
            yield f"{file} does not belong to it"


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder, however many names they have elsewhere."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def newest_s(folder: Path) -> float:
    """When anything below a folder was changed last, in seconds since 1970."""
    return max((path.lstat().st_mtime for path in folder.rglob("*")), default=folder.stat().st_mtime)


def _follow(item: Item, why: str, by_digest: Mapping[str, list[Item]], reasons: dict[Path, set[str]]) -> None:
    seen = reasons.setdefault(item.path, set())
    if why in seen:
        return
    seen.add(why)
    for digest in item.refers_to:
        for other in by_digest.get(digest, []) if digest else []:
            _follow(other, why, by_digest, reasons)


def _artifact(manifest: Path) -> Item:
    folder = manifest.parent
    try:
        record = dict(json.loads(manifest.read_text())["record"])
    except (OSError, ValueError, KeyError, TypeError):
        return _work(folder)
    digests = {name: value for name, value in record.items() if name.endswith("_digest") and isinstance(value, str)}
    return Item(
        stage=folder.parent.name,
        fingerprint=folder.name,
        path=folder,
        digest=str(record.get("digest", "")),
        refers_to=tuple(digests.values()),
        about=digests.get(ABOUT_OTHERS.get(folder.parent.name, ""), ""),
        bytes=folder_bytes(folder),
        used_s=manifest.stat().st_mtime,
    )


def _work(folder: Path) -> Item:
    stage, _, key = folder.name.rpartition("-")
    if not stage:  # an artifact whose manifest is damaged
        stage, key = folder.parent.name, folder.name
    return Item(stage=stage, fingerprint=key, path=folder, bytes=folder_bytes(folder), used_s=newest_s(folder))
