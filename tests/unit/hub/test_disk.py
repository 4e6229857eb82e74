"""Copies, links, free space and remembered digests."""

import hashlib
import json

import pytest

from qlora_core.errors import SourceError
from qlora_core.hub.disk import hash_files, place, require_space


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path):
    file, downloads = tmp_path / "a", tmp_path / "downloads"
    file.write_bytes(b"a")
    assert hash_files([file], downloads) == [hashlib.sha256(b"a").hexdigest()]
    memory = downloads / "hashes.json"
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), "remembered")))
    assert hash_files([file], downloads) == ["remembered"]
    file.write_bytes(b"bb")
    assert hash_files([file], downloads) == [hashlib.sha256(b"bb").hexdigest()]


def test_a_users_file_is_copied_so_that_writing_to_it_changes_nothing_here(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"before")
    place(file, tmp_path / "into" / "a", share=False)
    file.write_bytes(b"after!")
    assert (tmp_path / "into" / "a").read_bytes() == b"before"


def test_our_own_file_is_linked_and_takes_no_room(tmp_path):
    file, target = tmp_path / "a", tmp_path / "into" / "a"
    file.write_bytes(b"x")
    place(file, target, share=True)
    assert target.stat().st_ino == file.stat().st_ino


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(SourceError, match=r"fetching it needs 1024\.00 GiB .* are free"):
        require_space(tmp_path, 2**40, "fetching it")
