"""What a retraining will write is known from the model, less what is there already."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from qlora_core.artifacts import Adapter, Architecture, MergedModel, ModelSnapshot
from qlora_core.errors import StoreError
from qlora_core.recipe import Recipe
from tasks.disk import Need, disks_of, needs_of, on_disks
from tasks.preflight import preflight
from tasks.settings import Settings
from tasks.unchanged import Made
from tests.integration.hub_server import running
from tests.tiny import merge_proof, write_rows

GB = 1e9
SHAPE_7B = Architecture(
    model_type="qwen2", layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, vocab=152064,
    context_tokens=32768, parameters=7_615_616_512, tied_embeddings=False,
)  # fmt: skip
BASE = ModelSnapshot(path=Path("/x"), source="hub", revision="1", architecture=SHAPE_7B, dtype="bfloat16")
ADAPTER = Adapter(
    path=Path("/x"), base_digest="b", data_digest="d", steps=1, rank=16, trainable_parameters=1, train_loss=1.0,
    evaluation_loss=1.0,
)  # fmt: skip
PROOF = merge_proof()
MERGED = MergedModel(path=Path("/x"), base_digest="b", adapter_digest="a", dtype="bfloat16", proof=PROOF)


class Claimed(bytes):
    """A file that a hub lists with more bytes than a test can hold."""

    size = 15_200_000_000

    def __len__(self) -> int:
        return self.size


def recipe_of(model: dict[str, str], tmp_path: Path, **parts: object) -> Recipe:
    rows = {"source": "local", "path": str(write_rows(tmp_path / "rows.json"))}
    return Recipe.model_validate({"name": "r", "model": model, "data": {"rows": [rows]}, **parts})


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("MLFLOW_TRACKING_URI", "QLORA_DOWNLOADS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return Settings(home=tmp_path / "home")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def write_local(folder: Path, weight_bytes: int) -> dict[str, str]:
    """A model folder of some size, without the bytes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weight_bytes)
    return {"source": "local", "path": str(folder)}


def gigabytes(needs: list[Need]) -> dict[str, float]:
    return {need.what: round(need.bytes / GB, 1) for need in needs}


def test_a_model_on_a_hub_needs_its_download_the_merge_and_the_registry(hub, settings, tmp_path):
    hub.commit("models", "acme/m", {"config.json": b"{}", "model.safetensors": Claimed(b"x")})
    recipe = recipe_of({"source": "huggingface", "repo": "acme/m"}, tmp_path)
    assert gigabytes(needs_of(recipe, settings, Made())) == {
        "to download the model": 15.2,  # the store shares its blocks
        "checkpoints and adapter": 2.2,
        "the merged model": 15.2,
        "a copy to register from": 15.2,
        "the registered model": 15.2,
    }
    wide = recipe_of({"source": "huggingface", "repo": "acme/m"}, tmp_path, merge={"dtype": "float32"})
    assert gigabytes(needs_of(wide, settings, Made()))["the merged model"] == 30.4


def test_what_the_store_has_is_not_asked_for_again(hub, settings, tmp_path):
    hub.commit("models", "acme/m", {"config.json": b"{}", "model.safetensors": Claimed(b"x")})
    recipe = recipe_of({"source": "huggingface", "repo": "acme/m"}, tmp_path)
    assert gigabytes(needs_of(recipe, settings, Made(BASE))) == {
        "checkpoints and adapter": 1.9,  # four times what 40 million trained parameters need
        "the merged model": 15.2,
        "a copy to register from": 15.2,
        "the registered model": 15.2,
    }
    assert "checkpoints and adapter" not in gigabytes(needs_of(recipe, settings, Made(BASE, None, ADAPTER)))
    last = gigabytes(needs_of(recipe, settings, Made(BASE, None, ADAPTER, MERGED)))
    assert last == {"a copy to register from": 15.2, "the registered model": 15.2}


def test_a_model_on_another_disk_than_the_store_is_there_twice(hub, settings, tmp_path):
    hub.commit("models", "acme/m", {"config.json": b"{}", "model.safetensors": Claimed(b"x")})
    recipe = recipe_of({"source": "huggingface", "repo": "acme/m"}, tmp_path)
    memory = Path("/dev/shm")
    if memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    with TemporaryDirectory(dir=memory) as downloads:
        apart = settings.model_copy(update={"downloads": Path(downloads)})
        needs = needs_of(recipe, apart, Made())
        one, two = on_disks(needs)
    assert gigabytes(needs)["the model"] == 15.2
    assert (one.folder, [need.what for need in one.needs]) == (Path(downloads), ["to download the model"])
    assert two.folder.is_relative_to(tmp_path)
    assert sum(need.bytes for need in two.needs) == sum(need.bytes for need in needs) - one.needs[0].bytes


def test_a_local_model_is_copied_and_a_gguf_file_grows(settings, tmp_path):
    local = recipe_of(write_local(tmp_path / "m", 400_000_000), tmp_path)
    assert gigabytes(needs_of(local, settings, Made()))["the model"] == 0.4
    with (tmp_path / "m-q4_k_m.gguf").open("wb") as file:
        file.truncate(400_000_000)
    gguf = recipe_of({"source": "local", "path": str(tmp_path / "m-q4_k_m.gguf")}, tmp_path)
    assert gigabytes(needs_of(gguf, settings, Made()))["the merged model"] == 1.6


def test_a_team_keeps_the_registry_elsewhere_and_fetches_the_champion(settings, tmp_path):
    recipe = recipe_of(write_local(tmp_path / "m", 400_000_000), tmp_path)
    team = settings.model_copy(update={"mlflow_server": "http://mlflow.example:5000"})
    found = gigabytes(needs_of(recipe, team, Made()))
    assert "the registered model" not in found
    assert found["the champion to compare with"] == 0.4


def test_a_model_that_will_not_fit_is_refused_before_anything_is_fetched(hub, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Claimed, "size", 10**15)
    hub.commit("models", "acme/m", {"config.json": b"{}", "model.safetensors": Claimed(b"x")})
    recipe = recipe_of({"source": "huggingface", "repo": "acme/m"}, tmp_path)
    with pytest.raises(StoreError, match=r"1000000\.0 GB to download the model.*QLORA_HOME moves everything"):
        preflight(recipe, settings)
    assert hub.downloads("safetensors") == []
    (disk,) = disks_of(recipe, settings)
    assert disk.free_bytes < disk.needed_bytes


def test_a_small_model_asks_for_little(settings, tmp_path):
    """A constant would refuse it on a disk that holds it ten times."""
    recipe = recipe_of(write_local(tmp_path / "m", 2_000_000), tmp_path)
    (disk,) = disks_of(recipe, settings)
    assert disk.needed_bytes < 0.6 * GB
