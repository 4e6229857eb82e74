"""Taking one file out of an archive that nobody vouches for."""

import stat
import zipfile

import pytest

from qlora_core.errors import SourceError
from qlora_core.hub import archive as archives
from qlora_core.hub.archive import extract


@pytest.fixture
def sdist(tmp_path, make_sdist):
    path = tmp_path / "a-1.0.tar.gz"
    path.write_bytes(
        make_sdist("a-1.0", {"data/rows_en.json": b"1", "data/rows_zh.json": b"2"}, {"data/link": "/etc/passwd"})
    )
    return path


def test_a_missing_file_names_its_neighbours(sdist, tmp_path):
    with pytest.raises(SourceError, match=r"no file data/rows\.json; near it: data/rows_(en|zh)\.json"):
        extract(sdist, "data/rows.json", tmp_path / "out")


def test_a_file_in_another_folder_is_found_as_a_neighbour(sdist, tmp_path):
    with pytest.raises(SourceError, match=r"near it: data/rows_en\.json"):
        extract(sdist, "src/rows_en.json", tmp_path / "out")


def test_a_link_is_refused(sdist, tmp_path):
    with pytest.raises(SourceError, match="is a link or a device"):
        extract(sdist, "data/link", tmp_path / "out")


def test_a_link_in_a_wheel_is_refused(tmp_path):
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as archive:
        entry = zipfile.ZipInfo("a/link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(SourceError, match="is a link or a device"):
        extract(path, "a/link", tmp_path / "out")


@pytest.mark.parametrize("member", ["../secret", "/etc/passwd", "a/../../b", "a\\b", ""])
def test_a_path_that_leaves_the_archive_is_refused(sdist, tmp_path, member):
    with pytest.raises(SourceError, match="is no path inside an archive"):
        extract(sdist, member, tmp_path / "out")


def test_an_archive_that_unpacks_to_too_much_is_refused(sdist, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 1)
    with pytest.raises(SourceError, match="claims to unpack to 2 bytes"):
        extract(sdist, "data/rows_zh.json", tmp_path / "out")


def test_a_damaged_archive_says_what_to_remove(sdist, tmp_path):
    sdist.write_bytes(b"\x1f\x8b" + b"junk" * 20)
    with pytest.raises(SourceError, match=r"cannot be unpacked.*remove it"):
        extract(sdist, "data/rows_en.json", tmp_path / "out")
