"""Free what the artifact store has not been asked for in a long time.

Every artifact can be made again, so that removing one costs time and nothing else. `Store.find` leaves the time of the
last use on a manifest: what a nightly run looks at stays.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_core.artifacts import Record
from qlora_core.store import MANIFEST, Store, discard

DAY_S = 86400
NOT_STAGES = ("work", "locks")


class Freed(Record):
    """What a clean-up removed."""

    folders: int
    bytes: int

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.folders} folders removed, {self.bytes / 1e9:,.2f} GB"


def clean_up(store: Store, unused_days: float) -> Freed:
    """Remove artifacts, and work that was given up, which nobody has used for so many days; what is locked stays.

    Args:
        store: where.
        unused_days: how long since the last use; 0 removes all that is not in use now.
    """
    limit_s = time.time() - unused_days * DAY_S
    freed = [_remove(store, lock, folder) for lock, folder, used_s in _folders(store) if used_s < limit_s]
    return Freed(folders=sum(size is not None for size in freed), bytes=sum(size or 0 for size in freed))


def _folders(store: Store) -> Iterator[tuple[str, Path, float]]:
    """Name of the lock, folder, and when it was last used (seconds since 1970)."""
    for manifest in store.root.glob(f"*/*/{MANIFEST}"):
        stage, key = manifest.parent.parent.name, manifest.parent.name
        if stage not in NOT_STAGES:
            yield f"{stage}-{key}", manifest.parent, manifest.stat().st_mtime
    for work in store.root.glob("work/*"):
        newest = max((path.stat().st_mtime for path in work.rglob("*")), default=work.stat().st_mtime)
        yield work.name, work, newest


def _remove(store: Store, lock: str, folder: Path) -> int | None:
    """The bytes that were freed; None if somebody works on it."""
    (store.root / "locks").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(store.root / "locks" / f"{lock}.lock", timeout=0):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            (folder / MANIFEST).unlink(missing_ok=True)  # first: without it a folder is no artifact
            discard(folder)
            return size
    except Timeout:
        return None
