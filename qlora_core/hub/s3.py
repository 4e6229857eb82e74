"""A bucket or a folder in S3, or in what speaks its protocol: `AWS_ENDPOINT_URL` and the usual keys are obeyed.

The revision is a digest of names and entity tags, so that a listing alone tells whether anything has changed.

    <downloads>/s3/<bucket>/<digest of key and tag>/<name>
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from qlora_core.artifacts import Record
from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import Note, Report
from qlora_core.hub.disk import require_space
from qlora_core.hub.network import is_offline
from qlora_core.hub.resolved import Files, Resolved, Role, require_pinned
from qlora_core.hub.select import select_data_files, select_model_files
from qlora_core.recipe import S3Source
from qlora_core.store import sha256_of_json

REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403")
ABSENT = ("NoSuchBucket", "NoSuchKey", "404")
ATTEMPTS = 5
TIMEOUT_S = 20
T = TypeVar("T")


class Entry(Record):
    """One object, by its name below the source."""

    key: str
    bytes: int
    tag: str
    """What S3 changes with the content."""


def resolve(source: S3Source, role: Role, downloads: Path) -> Resolved:
    """Pin the source to what the bucket holds now; nothing is fetched.

    Raises:
        SourceError: there is no such bucket, or nothing in it that can be used.
        SourceUnavailableError: it could not be asked now.
    """
    entries = _entries(source)
    names = _selected(source, role, entries)
    revision = sha256_of_json({name: [entries[name].bytes, entries[name].tag] for name in names})
    require_pinned(source.url, source.revision, revision)
    return Resolved(source=source, description=f"s3 {source.url}", revision=revision, name=source.url)


def model_files(source: S3Source, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The files that a model and its tokenizer are loaded from.

    Raises:
        SourceError: it is no model, or has changed since it was resolved.
        SourceUnavailableError: it broke off too often.
    """
    return _fetch(source, "model", resolved, downloads, report)


def list_model_files(source: S3Source, downloads: Path) -> list[tuple[int, Path]]:
    """The same before anything is fetched: the bytes of each file, and where it would lie.

    Raises:
        SourceError: it is no model.
        SourceUnavailableError: it could not be asked now.
    """
    entries = _entries(source)
    names = _selected(source, "model", entries)
    return [(entries[name].bytes, _place(source, name, entries[name], downloads)) for name in names]


def data_files(source: S3Source, resolved: Resolved, downloads: Path, scratch: Path, report: Report) -> Files:
    """The one object, or all data files of the folder.

    Raises:
        SourceError: there are none, or they have changed since they were resolved.
        SourceUnavailableError: it broke off too often.
    """
    return _fetch(source, "data", resolved, downloads, report)


def _fetch(source: S3Source, role: Role, resolved: Resolved, downloads: Path, report: Report) -> Files:
    entries = _entries(source)
    wanted = {name: entries[name] for name in _selected(source, role, entries)}
    if sha256_of_json({name: [entry.bytes, entry.tag] for name, entry in wanted.items()}) != resolved.revision:
        raise _changed(source)
    places = {name: _place(source, name, entry, downloads) for name, entry in wanted.items()}
    missing = [name for name, place in places.items() if not place.is_file()]
    size = sum(wanted[name].bytes for name in missing)
    if missing:
        downloads.mkdir(parents=True, exist_ok=True)
        require_space(downloads, size, f"downloading {source.url}")
        report(Note(message=f"downloading {len(missing)} files, {size / 1e6:,.1f} MB, of {source.url}"))
    for name in missing:
        _download(source, wanted[name], places[name])
    return places


def _download(source: S3Source, entry: Entry, place: Path) -> None:
    """In parts and in parallel, as the client does; named only when it is whole and still the object listed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    client = _client()
    _ask(source, lambda: client.download_file(source.bucket, entry.key, str(part)))
    now = _ask(source, lambda: client.head_object(Bucket=source.bucket, Key=entry.key))
    if now["ETag"] != entry.tag or part.stat().st_size != entry.bytes:
        part.unlink()
        raise _changed(source)
    part.replace(place)


def _entries(source: S3Source) -> dict[str, Entry]:
    """Every object by its name: one whose key is the source's, or all below it."""
    if is_offline():
        raise SourceUnavailableError(f"HF_HUB_OFFLINE forbids asking for {source.url}; unset it")

    def pages() -> list[dict[str, Any]]:
        listing = _client().get_paginator("list_objects_v2").paginate(Bucket=source.bucket, Prefix=source.prefix)
        return [found for page in listing for found in page.get("Contents", [])]

    found = {}
    folder = source.prefix.rstrip("/") + "/" if source.prefix else ""
    for item in _ask(source, pages):
        key = item["Key"]
        if key == source.prefix and not key.endswith("/"):
            found[PurePosixPath(key).name] = Entry(key=key, bytes=item["Size"], tag=item["ETag"])
        elif key.startswith(folder) and not key.endswith("/"):
            name = key.removeprefix(folder)
            if ".." in PurePosixPath(name).parts or "\\" in name or name.startswith("/"):
                raise SourceError(f"{source.url} holds an object named {name!r}, which is no safe path")
            found[name] = Entry(key=key, bytes=item["Size"], tag=item["ETag"])
    if not found:
        raise SourceError(f"url: {source.url} holds nothing; a folder is s3://bucket/folder, an object its whole key")
    return found


def _selected(source: S3Source, role: Role, entries: dict[str, Entry]) -> list[str]:
    return (select_model_files if role == "model" else select_data_files)(entries, source.url)


def _place(source: S3Source, name: str, entry: Entry, downloads: Path) -> Path:
    return downloads / "s3" / source.bucket / sha256_of_json([entry.key, entry.tag])[:32] / PurePosixPath(name).name


def _client() -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise SourceError(
            f"source: s3 needs {error.name}, which is not installed; install it with: pip install 'qlora-flows[team]'"
        ) from error
    retries = {"mode": "standard", "max_attempts": ATTEMPTS}
    config = Config(retries=retries, connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S * 3)
    return boto3.Session().client("s3", config=config)  # of its own: the shared one remembers old keys


def _ask(source: S3Source, call: Callable[[], T]) -> T:
    """The call's answer, or what its failure means."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

    try:
        return call()
    except NoRegionError as error:
        raise SourceError(
            f"{source.url}: set AWS_DEFAULT_REGION; us-east-1 does for most stores of one's own"
        ) from error
    except NoCredentialsError as error:
        raise SourceError(f"{source.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE") from error
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if code in REFUSED:
            raise SourceError(
                f"{source.url} may not be read with the key in AWS_ACCESS_KEY_ID ({code}); it needs ListBucket and "
                "GetObject"
            ) from error
        if code in ABSENT:
            raise SourceError(f"url: there is no {source.url} ({code}); look at AWS_ENDPOINT_URL too") from error
        raise SourceUnavailableError(f"{source.url}: {error}; try again later") from error
    except BotoCoreError as error:
        raise SourceUnavailableError(f"{source.url} cannot be reached: {error}; look at AWS_ENDPOINT_URL") from error


def _changed(source: S3Source) -> SourceError:
    return SourceError(f"{source.url} changed while it was being used; run again when it is quiet")
