"""Files on this machine: free space, copies that share blocks, and digests that are not computed twice."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_core.errors import SourceError
from qlora_core.events import Progress, Report
from qlora_core.store import sha256_of_file, sha256_of_json, write_atomically

SPARE_BYTES = 256 * 2**20
"""Left free on the disk beside what is about to be written."""
HASH_THREADS = 8


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that `needed_bytes` fit into a folder's file system.

    Raises:
        SourceError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes + SPARE_BYTES > free:
        raise SourceError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB in {folder}, where {free / 2**30:.2f} GiB are free "
            f"and {SPARE_BYTES / 2**30:.2f} GiB must stay so; free some space or use another disk"
        )


def place(file: Path, target: Path, share: bool) -> None:
    """Put a file at `target`, making its folders.

    Args:
        file: where it is.
        target: where it is wanted.
        share: hard-link it if it lies on the same file system. Only for files that nobody else writes to: a user's
            own file may be overwritten in place later, and would change under the artifact.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    file = file.resolve()
    if share and file.stat().st_dev == target.parent.stat().st_dev:
        os.link(file, target)
    else:
        _copy(file, target)


def digest_of_files(files: Mapping[str, Path], downloads: Path) -> str:
    """SHA-256 over names and contents; files that have not changed since the last call are not read again."""
    names = sorted(files)
    return sha256_of_json(dict(zip(names, hash_files([files[name] for name in names], downloads), strict=True)))


def hash_files(files: Sequence[Path], downloads: Path, report: Report | None = None) -> list[str]:
    """SHA-256 of each file, read in parallel, remembered in `downloads` by path, inode, size and time."""
    memory = downloads / "hashes.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.is_file() else {}
    keys = [_identity(file) for file in files]
    unknown = {key: file for key, file in zip(keys, files, strict=True) if key not in known}
    if unknown:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            for done, (key, digest) in enumerate(zip(unknown, pool.map(sha256_of_file, unknown.values()), strict=True)):
                known[key] = digest
                if report:
                    report(Progress(what="checking files", done=done + 1, total=len(unknown), unit="files"))
        downloads.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(known, indent=0))
    return [known[key] for key in keys]


def _identity(file: Path) -> str:
    facts = file.stat()
    return f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{file.resolve()}"


def _copy(file: Path, target: Path) -> None:
    """Copy inside the kernel, which shares the blocks on file systems that can (XFS, Btrfs)."""
    with file.open("rb") as source, target.open("wb") as copy:
        try:
            while os.copy_file_range(source.fileno(), copy.fileno(), 2**30):
                pass
        except OSError:
            source.seek(0)
            copy.seek(0)
            shutil.copyfileobj(source, copy, 2**20)
