"""What nobody uses goes, what somebody uses or works on stays."""

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from qlora_core.artifacts import Artifact
from qlora_core.cleanup import clean_up
from qlora_core.inventory import damage, inventory
from qlora_core.store import MANIFEST, Store

DAY_S = 86400
OLD, NEW = "a" * 64, "b" * 64


def make(store: Store, key: str, days_ago: float) -> Path:
    def produce(work: Path) -> Artifact:
        (work / "file").write_bytes(b"x" * 1000)
        return Artifact(path=work)

    made = store.obtain(Artifact, "merge", key, produce)
    age(made.path / MANIFEST, days_ago)
    return made.path


def age(path: Path, days_ago: float) -> None:
    then_s = time.time() - days_ago * DAY_S
    os.utime(path, (then_s, then_s))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_an_artifact_that_was_not_used_for_long_goes_and_a_newer_one_stays(store: Store):
    old, new = make(store, OLD, days_ago=31), make(store, NEW, days_ago=29)
    freed = clean_up(store, 30)
    assert (freed.folders, old.exists(), new.exists()) == (1, False, True)
    assert freed.bytes > 1000


def test_finding_an_artifact_is_a_use(store: Store):
    old = make(store, OLD, days_ago=31)
    assert store.find(Artifact, "merge", OLD) is not None
    assert clean_up(store, 30).folders == 0
    assert old.exists()


def test_looking_through_all_artifacts_is_no_use_of_any(store: Store):
    make(store, OLD, days_ago=31)
    assert len(list(store.newest(Artifact, "merge"))) == 1
    assert clean_up(store, 30).folders == 1


def test_what_somebody_works_on_stays(store: Store):
    old = make(store, OLD, days_ago=31)
    with FileLock(store.root / "locks" / f"merge-{OLD}.lock"):
        assert clean_up(store, 30).folders == 0
    assert old.exists()


def test_work_that_was_given_up_goes(store: Store):
    work = store.root / "work" / f"train-{OLD}"
    work.mkdir(parents=True)
    (work / "checkpoint").write_bytes(b"x")
    age(work / "checkpoint", 31)
    age(work, 31)
    assert clean_up(store, 30).folders == 1
    assert not work.exists()


class Derived(Artifact):
    base_digest: str


def derive(store: Store, base: Artifact, key: str, days_ago: float) -> Artifact:
    def produce(work: Path) -> Derived:
        (work / "file").write_text(base.digest)
        return Derived(path=work, base_digest=base.digest)

    made = store.obtain(Derived, "evaluate", key, produce)
    age(made.path / MANIFEST, days_ago)
    return made


def at(store: Store, key: str) -> Artifact:
    (found,) = [a for a in store.newest(Artifact, "merge") if a.fingerprint == key]
    return found


def test_what_an_alias_or_a_live_run_needs_stays_with_all_that_it_was_made_from(store: Store):
    base = make(store, OLD, days_ago=99)
    made = derive(store, at(store, OLD), NEW, days_ago=99)
    other = derive(store, made, "c" * 64, days_ago=99).path
    assert clean_up(store, 30, {made.digest: "m@champion"}).folders == 1
    assert (base.exists(), made.path.exists(), other.exists()) == (True, True, False)
    assert clean_up(store, 0, {NEW: "a run that is under way"}).folders == 0
    assert clean_up(store, 0).folders == 2


def test_what_a_recent_artifact_was_made_from_stays_however_old_it_is(store: Store):
    base = make(store, OLD, days_ago=99)
    derive(store, at(store, OLD), NEW, days_ago=1)
    assert clean_up(store, 30).folders == 0
    assert base.exists()


def test_a_use_that_lies_in_the_future_counts_as_one_just_now(store: Store):
    old = make(store, OLD, days_ago=-400)
    assert clean_up(store, 1).folders == 0
    assert old.exists()
    assert clean_up(store, 0).folders == 1


def test_damage_is_named_file_by_file(store: Store):
    folder = make(store, OLD, days_ago=1)
    (item,) = inventory(store)
    assert list(damage(item)) == []
    (folder / "file").write_bytes(b"y" * 1000)
    (folder / "more").write_text("?")
    assert list(damage(item)) == [f"{folder / 'file'} was altered", f"{folder / 'more'} does not belong to it"]
    (folder / MANIFEST).write_text("{")
    (item,) = inventory(store)
    assert not item.digest
    assert clean_up(store, 0).folders == 1


def test_a_clean_up_finishes_what_another_one_was_killed_at(store: Store):
    left = store.root / "trash" / "x"
    left.mkdir(parents=True)
    (left / "file").write_bytes(b"x")
    assert clean_up(store, 30).folders == 0
    assert not left.exists()
