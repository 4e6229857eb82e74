"""Free what the artifact store has not been asked for in a long time.

Every artifact can be made again, so that removing one costs time and nothing else. `Store.find` leaves the time of the
last use on a manifest: what a nightly run looks at stays, and so does everything that it was made from.
"""

from collections.abc import Mapping, Sequence

from filelock import FileLock, Timeout

from qlora_core.artifacts import Record
from qlora_core.inventory import Item, inventory, needed
from qlora_core.store import Store

RECENT = "a recent use"


class Freed(Record):
    """What a clean-up removed."""

    folders: int
    bytes: int

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.folders} folders removed, {self.bytes / 1e9:,.2f} GB"


def clean_up(
    store: Store, unused_days: float, roots: Mapping[str, str] | None = None, others: Sequence[Item] = ()
) -> Freed:
    """Remove artifacts, and work that was given up, which nobody has used for so many days; what is locked stays.

    Args:
        store: where.
        unused_days: how long since the last use; 0 removes all that is not in use now.
        roots: digests and fingerprints of what must stay whatever its age, with all that it was made from.
        others: folders beside the store that nothing refers to.
    """
    store.empty_trash()
    items = unneeded([*inventory(store), *others], unused_days, roots or {})
    freed = [_remove(store, item) for item in items]
    return Freed(folders=sum(size is not None for size in freed), bytes=sum(size or 0 for size in freed))


def unneeded(items: list[Item], unused_days: float, roots: Mapping[str, str]) -> list[Item]:
    """What a clean-up would remove, unless somebody works on it."""
    recent = {item.fingerprint: RECENT for item in items if item.digest and item.unused_days() < unused_days}
    kept = needed(items, {**recent, **roots})
    return [item for item in items if item.path not in kept and item.unused_days() >= unused_days]


def _remove(store: Store, item: Item) -> int | None:
    """The bytes that were freed; None if somebody works on it."""
    (store.root / "locks").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(store.root / "locks" / f"{item.lock}.lock", timeout=0):
            store.remove(item.path)
            return item.bytes
    except Timeout:
        return None
