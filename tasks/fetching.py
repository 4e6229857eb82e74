"""The files of a registered version on this machine: those that are here already, else fetched once into the store."""

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_core.artifacts import Artifact, MergedModel
from qlora_core.errors import StoreError
from qlora_core.inventory import Item, folder_bytes, newest_s
from qlora_core.merging.merge import MODEL
from qlora_core.store import Store, fingerprint
from tasks.registry import ModelRegistry, Version
from tasks.settings import Settings, without_secrets

STAGE = "champion"
EARLIER = "champions"
"""Where earlier versions kept copies, outside of the store."""


class FetchedModel(Artifact):
    """A registered version as plain transformers files, below `model`."""

    model_digest: str
    """Of the merge that was registered; empty where the version does not say."""


def model_folder(registry: ModelRegistry, version: Version) -> Path:
    """The model of a version as plain transformers files, to be read only.

    The registry's own folder where that is on this machine, the merge in the store that was registered, or a copy that
    is fetched under the lock of its fingerprint: any number of processes wait for one download.

    Raises:
        StoreError: the registry's folder is gone.
    """
    store, digest = Store(registry.settings.store), version.model_digest or ""
    address = urlsplit(registry.address(version))
    folder = Path(unquote(address.path)) if address.scheme in ("", "file") else None
    found = _plain_model(folder) if folder else None
    if found:
        return found
    merged = store.find_digest(MergedModel, "merge", digest) if digest else None
    if merged is not None:
        return merged.path / MODEL
    if folder is not None and not folder.is_dir():
        raise _gone(folder, version)

    def fetch(into: Path) -> FetchedModel:
        shutil.rmtree(into / MODEL, ignore_errors=True)
        registry.fetch(version, into).rename(into / MODEL)
        return FetchedModel(path=into, model_digest=digest)

    key = fetched_key(version, registry.settings)
    return store.obtain(FetchedModel, STAGE, key, fetch, keep=(f"{MODEL}/**/*",)).path / MODEL


def _plain_model(folder: Path) -> Path | None:
    """Where the files of a registered version lie; one of others may have been registered from a plain folder."""
    places = (folder / MODEL, folder)
    return next((place for place in places if (place / "config.json").is_file()), None)


def fetched_key(version: Version, settings: Settings) -> str:
    """The fingerprint of a version's copy."""
    inputs = {
        "registry": "embedded" if settings.embedded_mlflow else without_secrets(settings.mlflow_uri),
        "version": f"{version.name} {version.number}",
        "run": version.run_id,
        "model": version.model_digest or "",
    }
    return fingerprint(STAGE, 1, {}, inputs)


def earlier_copies(settings: Settings) -> list[Item]:
    """What earlier versions have copied and never freed; nothing reads it any more."""
    folders = sorted(path for path in (settings.root / EARLIER).glob("*") if path.is_dir())
    return [
        Item(stage=EARLIER, fingerprint=path.name, path=path, bytes=folder_bytes(path), used_s=newest_s(path))
        for path in folders
    ]


def _gone(folder: Path, version: Version) -> StoreError:
    return StoreError(
        f"{version.name} version {version.number} is registered with files at {folder}, which are not there. Put the "
        "folder back (a home that is moved needs its folder mlflow too), or retrain with --force"
    )
