"""The home: where it was before, and whether what serves is there."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks.doctor.check import Check, failed, ok, warned
from tasks.home import earlier_place
from tasks.settings import Settings

SERVED = (
    "SELECT alias.name, alias.alias, alias.version, version.storage_location FROM registered_model_aliases AS alias "
    "JOIN model_versions AS version ON alias.name = version.name AND alias.version = version.version"
)


def examine(settings: Settings) -> Iterator[Check]:
    """A line for the home, one for each alias whose files are gone; nothing where no home is yet."""
    if not settings.root.is_dir():
        return
    old = earlier_place(settings)
    if old is not None:
        do = "`qlora models`, or any other command but this one, adapts it; move it whole, with its folder mlflow"
        yield warned("home", f"{settings.root} was moved or copied from {old}", do)
        return
    missing = list(_missing(settings))
    for name, folder in missing:
        do = "put the folder back, or promote or roll back to another version"
        yield failed("home", f"the files of {name} are not at {folder}", do)
    if not missing:
        yield ok("home", str(settings.root))


def _missing(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Aliases of the embedded registry whose model is not where MLflow will look for it."""
    if not settings.embedded_mlflow or not settings.mlflow_database.is_file():
        return
    with closing(sqlite3.connect(f"{settings.mlflow_database.as_uri()}?mode=ro", uri=True)) as connection:
        for name, alias, version, place in connection.execute(SERVED).fetchall():
            address = urlsplit(place or "")
            folder = Path(unquote(address.path))
            if address.scheme == "file" and not folder.is_dir():
                yield f"{name}@{alias} (version {version})", folder
