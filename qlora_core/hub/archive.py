"""Take one file out of a wheel or an sdist without running or installing anything."""

import difflib
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from qlora_core.errors import QloraError, SourceError
from qlora_core.hub.disk import require_space

MAX_UNPACKED_BYTES = 64 * 2**30
"""An archive that claims more is taken for a decompression bomb."""
MAX_MEMBERS = 200_000


def extract(archive: Path, member: str, target: Path) -> Path:
    """Write the archive's file `member` to `target` and return it.

    Args:
        archive: a wheel (zip) or an sdist (tar.gz), already verified.
        member: path inside it; that of an sdist starts below its top folder `name-version/`.
        target: where to write; nothing of the archive's own paths is used.

    Raises:
        SourceError: the archive is damaged or suspicious, or has no such regular file.
    """
    _check_member(member)
    try:
        opened = _in_zip if zipfile.is_zipfile(archive) else _in_tar
        with opened(archive, member) as (source, size):
            require_space(target.parent, size, f"unpacking {member}")
            with target.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
    except (QloraError, MemoryError):
        raise
    except Exception as error:  # beside their own errors: names without a character, dates without a month
        raise SourceError(f"{archive} cannot be unpacked: {error}; remove it so that it is fetched again") from error
    if target.stat().st_size != size:
        raise SourceError(f"{member} of {archive.name} ended early; remove {archive} so that it is fetched again")
    return target


def _check_member(member: str) -> None:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or not path.name:
        raise SourceError(f"file: {member!r} is no path inside an archive; write it like `folder/name.json`")


@contextmanager
def _in_zip(archive: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    with zipfile.ZipFile(archive) as opened:
        entries = {entry.filename: entry for entry in opened.infolist() if not entry.is_dir()}
        if member not in entries:
            _no_such_member(archive, member, entries)
        entry = entries[member]
        if stat.S_ISLNK(entry.external_attr >> 16):
            _not_regular(archive, member)
        _check_size(archive, entry.file_size)
        with opened.open(entry) as source:
            yield source, entry.file_size


@contextmanager
def _in_tar(archive: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    names, unpacked = [], 0
    with tarfile.open(archive, "r:gz") as opened:
        for entry in opened:
            name = entry.name.partition("/")[2]
            names.append(name)
            unpacked += entry.size
            _check_size(archive, unpacked, len(names))
            if name != member:
                continue
            source = opened.extractfile(entry) if entry.isreg() else None
            if source is None:
                _not_regular(archive, member)
            yield source, entry.size
            return
    _no_such_member(archive, member, names)


def _check_size(archive: Path, unpacked_bytes: int, members: int = 0) -> None:
    if unpacked_bytes > MAX_UNPACKED_BYTES or members > MAX_MEMBERS:
        raise SourceError(
            f"{archive.name} claims to unpack to {unpacked_bytes:,} bytes in {members:,} files; "
            f"at most {MAX_UNPACKED_BYTES:,} bytes and {MAX_MEMBERS:,} files are accepted"
        )


def _not_regular(archive: Path, member: str) -> NoReturn:
    raise SourceError(f"{member} in {archive.name} is a link or a device, not a file; name the file itself")


def _no_such_member(archive: Path, member: str, names: Iterable[str]) -> NoReturn:
    files = sorted(set(names) - {""})
    base = PurePosixPath(member).name
    near = [name for name in files if PurePosixPath(name).name == base]
    near += [name for name in difflib.get_close_matches(member, files, n=5, cutoff=0.5) if name not in near]
    hint = f"near it: {', '.join(near[:5])}" if near else f"it holds {len(files)} files, such as {', '.join(files[:5])}"
    raise SourceError(f"{archive.name} holds no file {member}; {hint}. Set `file:` to one of its paths")
