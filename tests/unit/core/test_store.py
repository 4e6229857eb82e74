import json
import os
import threading
from pathlib import Path

import pytest

from qlora_core.artifacts import Artifact
from qlora_core.errors import StoreError
from qlora_core.store import Store, fingerprint


class Thing(Artifact):
    size: int


KEY = fingerprint("thing", 1, {"a": 1}, {"base": "x"})


def make(folder: Path, text: str = "hello") -> Thing:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "file.txt").write_text(text)
    (folder / "log.txt").write_text("noise")
    return Thing(path=folder, size=len(text))


def test_a_fingerprint_changes_with_everything_that_decides_the_output():
    args = ("thing", 1, {"a": 1, "b": 2}, {"base": "x"})
    assert fingerprint(*args) == fingerprint("thing", 1, {"b": 2, "a": 1}, {"base": "x"})
    others = [("other", *args[1:]), ("thing", 2, *args[2:]), (*args[:2], {"a": 2}, args[3]), (*args[:3], {"base": "y"})]
    assert len({fingerprint(*args), *(fingerprint(*other) for other in others)}) == 5


def test_what_was_made_is_found_with_its_digest_and_only_with_what_was_kept(tmp_path):
    store = Store(tmp_path)
    made = store.obtain(Thing, "thing", KEY, make, keep=("sub/**/*",))
    assert store.find(Thing, "thing", KEY) == made
    assert made.fingerprint == KEY
    assert sorted(file.name for file in made.path.rglob("*") if file.is_file()) == ["file.txt", "manifest.json"]
    assert not list((tmp_path / "work").glob("*"))


def test_an_artifact_is_found_by_its_digest_too(tmp_path):
    store = Store(tmp_path)
    assert store.find_digest(Thing, "thing", "f" * 64) is None
    made = store.obtain(Thing, "thing", KEY, make)
    store.obtain(Thing, "thing", fingerprint("thing", 2, {}, {}), lambda into: make(into, "bye"))
    assert store.find_digest(Thing, "thing", made.digest) == made
    assert store.find_digest(Thing, "other", made.digest) is None


def test_the_digest_depends_on_content_alone(tmp_path):
    one, two, other = (
        Store(tmp_path / name).obtain(Thing, "thing", KEY, lambda into, text=text: make(into, text))
        for name, text in (("one", "hello"), ("two", "hello"), ("other", "bye"))
    )
    assert one.digest == two.digest != other.digest


def test_what_failed_half_way_is_not_there_but_its_work_is_kept_for_the_next_attempt(tmp_path):
    store = Store(tmp_path)

    def fail(into: Path) -> Thing:
        make(into)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.obtain(Thing, "thing", KEY, fail)
    assert store.find(Thing, "thing", KEY) is None
    with store.workspace("thing", KEY) as work:
        assert (work / "sub" / "file.txt").read_text() == "hello"


def test_an_altered_artifact_is_refused_with_what_to_do(tmp_path):
    store = Store(tmp_path)
    made = store.obtain(Thing, "thing", KEY, make)
    (made.path / "sub" / "file.txt").write_text("longer than before")
    with pytest.raises(StoreError, match=r"remove .* and run again"):
        store.find(Thing, "thing", KEY)


def test_two_that_want_the_same_do_the_work_once(tmp_path):
    calls: list[int] = []

    def slow(into: Path) -> Thing:
        calls.append(1)
        return make(into)

    def obtain() -> None:
        Store(tmp_path).obtain(Thing, "thing", KEY, slow)

    threads = [threading.Thread(target=obtain, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(calls) == 1


def test_a_name_from_outside_never_becomes_a_path(tmp_path):
    with pytest.raises(StoreError, match="no fingerprint"):
        Store(tmp_path).find(Thing, "thing", "../../etc")


def test_the_manifest_lists_every_file(tmp_path):
    made = Store(tmp_path).obtain(Thing, "thing", KEY, make)
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"sub/file.txt", "log.txt"}
    assert manifest["files"]["sub/file.txt"]["bytes"] == 5


def test_the_artifacts_of_a_stage_come_newest_first_and_altered_ones_not_at_all(tmp_path):
    store = Store(tmp_path)
    keys = [fingerprint("thing", 1, {"a": at}, {}) for at in range(3)]
    made = [store.obtain(Thing, "thing", key, make) for key in keys]
    for at, thing in enumerate(made):
        os.utime(thing.path / "manifest.json", (at, at))
    (made[2].path / "log.txt").unlink()
    assert list(store.newest(Thing, "thing")) == [made[1], made[0]]
    assert list(store.newest(Thing, "other")) == []


def killed_while(store: Store, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the thing, and die where `Path` is asked for `moment`, as a kill would: nothing is tidied up."""

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    def produce(into: Path) -> Thing:
        (into / "checkpoint").write_text("hours of work")
        made = make(into)
        monkeypatch.setattr(Path, moment, die)
        return made

    with pytest.raises(Killed):
        store.obtain(Thing, "thing", KEY, produce, keep=("sub/**/*",))
    monkeypatch.undo()


def test_who_is_killed_at_the_rename_goes_on_from_its_checkpoints(tmp_path, monkeypatch):
    store = Store(tmp_path)
    killed_while(store, "rename", monkeypatch)
    assert store.find(Thing, "thing", KEY) is None

    def go_on(into: Path) -> Thing:
        assert (into / "checkpoint").read_text() == "hours of work"
        assert sorted(path.name for path in into.iterdir()) == ["checkpoint", "log.txt", "sub"]
        return make(into)

    made = store.obtain(Thing, "thing", KEY, go_on, keep=("sub/**/*",))
    assert sorted(file.name for file in made.path.rglob("*") if file.is_file()) == ["file.txt", "manifest.json"]
    assert not list((tmp_path / "work").glob("*"))


def test_a_removal_that_was_killed_after_the_manifest_blocks_no_fingerprint(tmp_path):
    store = Store(tmp_path)
    made = store.obtain(Thing, "thing", KEY, make)
    (made.path / "manifest.json").unlink()  # how earlier versions began to remove
    again = store.obtain(Thing, "thing", KEY, make)
    assert (again.digest, store.find(Thing, "thing", KEY)) == (made.digest, again)


def test_what_was_removed_is_out_of_sight_at_once_and_gone_with_the_next_clean_up(tmp_path, monkeypatch):
    store = Store(tmp_path)
    made = store.obtain(Thing, "thing", KEY, make)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_core.store.discard", lambda _: None)  # killed before the first file went
        store.remove(made.path)
    assert not made.path.exists()
    assert store.find(Thing, "thing", KEY) is None
    assert list(store.root.glob("trash/*/sub/file.txt"))
    store.empty_trash()
    assert not list(store.root.glob("trash/*"))


def test_work_whose_artifact_is_there_already_goes(tmp_path):
    """Its process was killed between the rename and the end."""
    store = Store(tmp_path)
    made = store.obtain(Thing, "thing", KEY, make)
    work = tmp_path / "work" / f"thing-{KEY}"
    work.mkdir()
    (work / "checkpoint").write_text("x")
    assert store.obtain(Thing, "thing", KEY, make) == made
    assert not work.exists()
