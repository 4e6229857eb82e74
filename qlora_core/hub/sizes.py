"""How large a model is before it is fetched: by the hub's list of files, a release's size, or what is here already."""

import re
from pathlib import Path

from qlora_core.artifacts import Record
from qlora_core.hub.resolved import Resolved
from qlora_core.recipe import HubSource, LocalSource, PackageSource, S3Source

STORED_BITS = 16
"""Of a value of a GGUF file once it is a plain model."""
GGUF_BITS = re.compile(r"(?i)(?:^|[-_./])(?:i?q(\d)|[bf]+(16|32))")
FEWEST_BITS = 4


class ModelSize(Record):
    """Bytes that a model takes on this machine, in two places."""

    fetched: int
    """What has to be downloaded yet."""
    stored: int
    """The plain model folder."""
    shared: bool
    """Whether the folder shares its blocks with the downloads, where both are on one disk."""


def model_size(resolved: Resolved, downloads: Path) -> ModelSize | None:
    """The size of a resolved model; None where nobody says it.

    Raises:
        SourceError: its files cannot be listed.
    """
    source = resolved.source
    if isinstance(source, LocalSource):
        return _local(source)
    if isinstance(source, HubSource):
        return _repository(source, resolved, downloads)
    if isinstance(source, S3Source):
        return _bucket(source, downloads)
    return _release(source, downloads) if isinstance(source, PackageSource) else None


def _local(source: LocalSource) -> ModelSize:
    from qlora_core.hub.local import model_files_of

    files = model_files_of(source)
    size = sum(file.stat().st_size for file in files.values())
    return ModelSize(fetched=0, stored=_plain(size, next(iter(files))), shared=False)


def _repository(source: HubSource, resolved: Resolved, downloads: Path) -> ModelSize:
    from qlora_core.hub.repository import list_model_files

    listed = list_model_files(source, resolved.revision, downloads)
    missing = sum(file.bytes for file, place in listed if place is None)
    return ModelSize(fetched=missing, stored=sum(file.bytes for file, _ in listed), shared=True)


def _bucket(source: S3Source, downloads: Path) -> ModelSize:
    from qlora_core.hub.s3 import list_model_files

    listed = list_model_files(source, downloads)
    missing = sum(size for size, place in listed if not place.is_file())
    return ModelSize(fetched=missing, stored=sum(size for size, _ in listed), shared=True)


def _release(source: PackageSource, downloads: Path) -> ModelSize | None:
    from qlora_core.hub.package import release_size

    size, is_here = release_size(source, downloads)
    if size is None:
        return None
    return ModelSize(fetched=0 if is_here else size, stored=size + _plain(size, source.file), shared=False)


def _plain(size: int, name: str) -> int:
    """Bytes of a model once it is a plain folder; the name of a GGUF file tells how many bits a value has in it."""
    if not name.endswith(".gguf"):
        return size
    found = GGUF_BITS.search(name)
    bits = int(found[1] or found[2]) if found else FEWEST_BITS
    return size * STORED_BITS // max(bits, 1)
