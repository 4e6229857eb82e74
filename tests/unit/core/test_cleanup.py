"""What nobody uses goes, what somebody uses or works on stays."""

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from qlora_core.artifacts import Artifact
from qlora_core.cleanup import DAY_S, clean_up
from qlora_core.store import MANIFEST, Store

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
