"""The files of a version: in place, by the digest of a merge, or fetched once, seen and freed by the store."""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qlora_core.artifacts import MergedModel
from qlora_core.cleanup import clean_up
from qlora_core.errors import StoreError
from qlora_core.inventory import inventory, needed
from qlora_core.store import MANIFEST, Store
from tasks.doctor import home as home_check
from tasks.fetching import earlier_copies, model_folder
from tasks.keeping import roots
from tasks.registry import ModelRegistry, Version
from tasks.serving import server_of
from tasks.settings import Settings
from tasks.tracking import Tracker
from tests.tiny import merge_proof, write_model

QUESTION = [{"role": "user", "content": "hello?"}]
DAY_S = 86400


class Away(ModelRegistry):
    """A registry whose files are on a server."""

    fetches = 0

    def address(self, version: Version) -> str:
        return f"mlflow-artifacts:/{version.number}"

    def fetch(self, version: Version, into: Path) -> Path:
        type(self).fetches += 1
        return super().fetch(version, into)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def home(made: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a registered model, as the pipeline registers one."""
    home = tmp_path_factory.mktemp("fetching") / "home"
    shutil.copytree(made, home)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    register(Settings(home=home), model)
    return home


@pytest.fixture
def settings(home: Path, tmp_path: Path) -> Iterator[Settings]:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield Settings(home=home)
    shutil.rmtree(home / "store", ignore_errors=True)
    shutil.rmtree(home / "champions", ignore_errors=True)


def register(settings: Settings, model: Path) -> Version:
    tracker, registry = Tracker(settings), ModelRegistry(settings)
    run = tracker.client.create_run(tracker.experiment("m"))
    version = registry.register("m", "k" * 64, run.info.run_id, model, QUESTION, {"qlora.model_digest": "d" * 64})
    registry.client.set_registered_model_alias("m", "champion", str(version.number))
    tracker.client.set_terminated(run.info.run_id)
    return registry.version("m", version.number)


def test_files_that_are_on_this_machine_are_not_copied(settings: Settings):
    registry = ModelRegistry(settings)
    folder = model_folder(registry, registry.resolve("m"))
    assert folder.is_relative_to(settings.root / "mlflow" / "artifacts")
    assert (folder / "model.safetensors").is_file()
    assert inventory(Store(settings.store)) == []


def test_files_that_are_gone_are_said_to_be_gone(settings: Settings):
    registry = ModelRegistry(settings)
    version = registry.resolve("m")
    folder = Path(urlsplit(registry.address(version)).path)
    folder.rename(folder.with_name("elsewhere"))
    try:
        with pytest.raises(StoreError, match=r"m version 1 is registered with files at .*, which are not there"):
            model_folder(registry, version)
    finally:
        folder.with_name("elsewhere").rename(folder)


def test_the_doctor_looks_for_the_files_of_every_alias(settings: Settings):
    (well,) = home_check.examine(settings)
    assert (well.status, well.found) == ("ok", str(settings.root))
    artifacts = settings.root / "mlflow" / "artifacts"
    artifacts.rename(artifacts.with_name("elsewhere"))
    try:
        found = list(home_check.examine(settings))
    finally:
        artifacts.with_name("elsewhere").rename(artifacts)
    assert {check.status for check in found} == {"fail"}
    assert any("the files of m@champion (version 1) are not at" in check.found for check in found)


def test_a_server_knows_a_model_by_its_name_and_version(settings: Settings):
    server = server_of("m", "127.0.0.1", 8000, settings)
    assert server.model.startswith("m-1-")
    assert (server.folder / server.model / "config.json").is_file()
    assert server_of("m", "127.0.0.1", 8000, settings) == server


def test_several_that_want_a_model_from_a_server_fetch_it_once(settings: Settings):
    registry = Away(settings)
    version, found, Away.fetches = registry.resolve("m"), [], 0
    threads = [threading.Thread(target=lambda: found.append(model_folder(registry, version))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert Away.fetches == 1
    assert len(set(found)) == 1
    assert len(found) == 4
    assert (found[0] / "model.safetensors").is_file()


def test_a_fetched_model_is_seen_by_the_store_kept_while_it_is_champion_and_freed_afterwards(settings: Settings):
    registry, store = Away(settings), Store(settings.store)
    version = registry.resolve("m")
    folder = model_folder(registry, version)
    (item,) = inventory(store)
    assert (item.stage, item.bytes > 100_000) == ("champion", True)
    assert needed([item], roots(settings))[item.path] == ("m@challenger",) or needed([item], roots(settings))
    os.utime(item.path / MANIFEST, (1, 1))
    assert clean_up(store, 30, roots(settings)).folders == 0
    assert clean_up(store, 30, {}).folders == 1
    assert not folder.exists()


def test_a_merge_in_the_store_is_the_model_that_was_registered(settings: Settings):
    registry, store = Away(settings), Store(settings.store)
    proof = merge_proof()

    def produce(into: Path) -> MergedModel:
        (into / "model").mkdir()
        (into / "model" / "config.json").write_text("{}")
        return MergedModel(path=into, base_digest="b", adapter_digest="a", dtype="float32", proof=proof)

    merged, Away.fetches = store.obtain(MergedModel, "merge", "e" * 64, produce), 0
    version = registry.resolve("m")
    version = version.model_copy(update={"tags": {**version.tags, "qlora.model_digest": merged.digest}})
    assert model_folder(registry, version) == merged.path / "model"
    assert Away.fetches == 0


def test_copies_that_earlier_versions_left_are_listed_and_freed(settings: Settings):
    left = settings.root / "champions" / "m-1-abcdef"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"x" * 1000)
    (item,) = earlier_copies(settings)
    assert (item.path, item.bytes) == (left, 1000)
    assert clean_up(Store(settings.store), 30, {}, earlier_copies(settings)).folders == 0
    os.utime(left / "model.safetensors", (1, 1))
    os.utime(left, (1, 1))
    assert clean_up(Store(settings.store), 30, {}, earlier_copies(settings)).bytes == 1000
    assert earlier_copies(settings) == []


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Path]:
    """A folder for temporary files that is smaller than the model."""
    folder = tmp_path / "narrow"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_for_temporary_files_that_is_smaller_than_the_model_does_not_matter(
    settings: Settings, model: Path, narrow: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(narrow))
    tracker, registry = Tracker(settings), ModelRegistry(settings)
    run = tracker.client.create_run(tracker.experiment("m"))
    version = registry.register("narrow", "n" * 64, run.info.run_id, model, QUESTION, {})
    assert (model_folder(registry, version) / "model.safetensors").stat().st_size > 64_000
    assert tempfile.tempdir == str(narrow)
    assert inventory(Store(settings.store)) == []
