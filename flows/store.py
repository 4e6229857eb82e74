"""The commands about the artifact store."""

import json
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from flows.terminal import print_json
from qlora_core.cleanup import clean_up, unneeded
from qlora_core.errors import StoreError
from qlora_core.inventory import damage, inventory, is_locked, needed
from qlora_core.store import Store
from tasks.fetching import earlier_copies
from tasks.keeping import roots
from tasks.settings import Settings

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 160  # a file or a pipe has no edge to wrap at


def show_store(as_json: bool, settings: Settings) -> None:
    """Every artifact with its size, its last use, and who needs it."""
    store = Store(settings.store)
    items = inventory(store) + earlier_copies(settings)
    why = needed(items, roots(settings) if items else {})
    if as_json:
        rows = [
            {**item.model_dump(mode="json"), "needed_by": why.get(item.path, ()), "in_use": is_locked(store, item)}
            for item in items
        ]
        print_json(console, json.dumps(rows))
        return
    table = Table("what", "fingerprint", "MB", "last used (UTC)", "needed by", box=None, header_style="bold")
    table.columns[2].justify = "right"
    for item in items:
        used = datetime.fromtimestamp(item.used_s, UTC).strftime("%Y-%m-%d %H:%M")
        by = ["somebody works on it"] if is_locked(store, item) else list(why.get(item.path, ()))
        name = item.stage if item.digest else f"{item.stage} (unfinished)"
        table.add_row(name, item.fingerprint[:12], f"{item.bytes / 1e6:,.1f}", used, ", ".join(by))
    console.print(table)
    console.print(f"{len(items)} folders, {sum(item.bytes for item in items) / 1e9:,.2f} GB in {store.root}")


def verify_store(settings: Settings) -> None:
    """Hash every file again.

    Raises:
        StoreError: something is damaged.
    """
    items = inventory(Store(settings.store))
    broken = {item.path: found for item in items if (found := list(damage(item)))}
    for sentences in broken.values():
        for sentence in sentences:
            console.print(f"[yellow]{sentence}[/]")
    if broken:
        folders = " ".join(map(str, broken))
        raise StoreError(f"{len(broken)} of {len(items)} artifacts are damaged; remove {folders} and run again")
    console.print(f"{len(items)} folders are what was stored")


def collect_garbage(unused_days: float, dry_run: bool, settings: Settings) -> None:
    """Remove what nobody needs and nobody has used for so long."""
    store, keep = Store(settings.store), roots(settings)
    if not dry_run:
        console.print(clean_up(store, unused_days, keep, earlier_copies(settings)).sentence)
        return
    known = inventory(store) + earlier_copies(settings)
    items = [item for item in unneeded(known, unused_days, keep) if not is_locked(store, item)]
    for item in items:
        console.print(f"{item.bytes / 1e6:10,.1f} MB  {item.path}")
    console.print(f"{len(items)} folders would be removed, {sum(item.bytes for item in items) / 1e9:,.2f} GB")
