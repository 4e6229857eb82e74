"""Champions that this program did not make: set by hand, from a plain folder, with none of our tags."""

from pathlib import Path

import pytest

from qlora_core.artifacts import Architecture, MergedModel, ModelSnapshot, PreparedDataset
from qlora_core.errors import RegistryError, StoreError
from qlora_core.events import ignore
from qlora_core.recipe import Recipe, load_recipe
from qlora_core.store import Store
from tasks.evaluate_task import _champion_scores, _rival
from tasks.export_task import export
from tasks.foreign import reopened, rows_of, with_digest
from tasks.moves import Author, promote
from tasks.preflight import prepared
from tasks.recheck_task import recheck
from tasks.registry import ModelRegistry, Version
from tasks.settings import Settings
from tasks.stage import Stage
from tasks.tracking import Tracker
from tests.tiny import merge_proof, prepare_rows, write_model, write_recipe

NAME = "tiny-painter"
RECIPE = Recipe.model_validate(
    {
        "name": NAME,
        "model": {"source": "local", "path": "/model"},
        "data": {"rows": [{"source": "local", "path": "/rows.json"}], "seq_len_tokens": 128},
    }
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory, request) -> ModelRegistry:
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("QLORA_HOME", str(tmp_path_factory.mktemp("home")))
    settings = Settings()
    settings.make_home()
    return ModelRegistry(settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("theirs") / "model")


@pytest.fixture
def by_hand(registry, model, request) -> Version:
    """A version whose files are a plain folder, and the champion."""
    name = request.node.name
    registry.client.create_registered_model(name)
    registry.client.create_model_version(name, source=model.as_uri())
    registry.client.set_registered_model_alias(name, "champion", "1")
    return registry.version(name, 1)


def copies(registry: ModelRegistry) -> Path:
    return registry.settings.root / "champions"


def test_a_plain_folder_gets_the_digest_of_its_files_once(registry, by_hand, model):
    found = with_digest(registry, by_hand)
    assert len(found.model_digest) == 64
    assert registry.version(by_hand.name, 1).model_digest == found.model_digest
    assert with_digest(registry, found) == found
    fetched = registry.fetch(found, copies(registry))
    assert (fetched / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert registry.example(found) == []


def test_files_that_are_no_model_are_refused_in_words(registry, tmp_path, request):
    name = request.node.name
    (tmp_path / "notes.txt").write_text("not a model")
    registry.client.create_registered_model(name)
    for source in (tmp_path, tmp_path / "gone"):
        registry.client.create_model_version(name, source=source.as_uri())
    with pytest.raises(RegistryError, match="version 1 has no files that transformers loads: no config"):
        with_digest(registry, registry.version(name, 1))
    with pytest.raises(StoreError, match=r"version 2 is registered with files at .*gone, which are not there"):
        with_digest(registry, registry.version(name, 2))


@pytest.mark.slow
def test_a_champion_set_by_hand_is_scored_as_a_plain_model_folder(registry, by_hand, model, dataset):
    candidate = MergedModel(path=model, digest="c" * 64, base_digest="b", adapter_digest="a", dtype="f", proof=PROOF)
    rival = _rival(registry, by_hand.name, candidate)
    assert rival == by_hand
    tracker = Tracker(registry.settings)
    retraining = tracker.begin(RECIPE, "flow-1", None)
    stage = Stage("evaluate", retraining)
    scores = _champion_scores(stage, registry, with_digest(registry, rival), dataset)
    assert scores.scores["loss"] > 0
    assert scores.model_digest == registry.version(by_hand.name, 1).model_digest


def test_the_champions_own_model_is_compared_with_the_one_that_it_replaced(registry, request):
    name = request.node.name
    registry.client.create_registered_model(name)
    author = Author(who="the gates", why="2 gates of 2 passed")
    against = None
    for digest in ("a", "b"):
        tags = {"qlora.model_digest": digest}
        number = int(registry.client.create_model_version(name, source="file:///nowhere", tags=tags).version)
        promote(registry, name, number, against, author, author.why)
        against = digest
    candidate = MergedModel(path=Path("/"), digest="b", base_digest="b", adapter_digest="a", dtype="f", proof=PROOF)
    assert _rival(registry, name, candidate).model_digest == "a"
    registry.client.set_registered_model_alias(name, "previous", "2")
    assert _rival(registry, name, candidate) is None, "a model was compared with itself"


def test_what_a_version_of_others_needs_comes_from_the_newest_of_ours(registry, by_hand, dataset):
    tracker, store = Tracker(registry.settings), Store(registry.settings.store)
    with pytest.raises(RegistryError, match="was not made here, and no other version"):
        reopened(registry, tracker, by_hand, "flow-2")
    with pytest.raises(RegistryError, match="not made here, and has no rows of its own"):
        rows_of(registry, store, by_hand)
    ours = tracker.begin(RECIPE, "flow-1", None)
    tags = {"qlora.parent_run": ours.parent_run_id, "qlora.data_digest": dataset.digest}
    registry.client.create_model_version(by_hand.name, source="file:///nowhere", tags=tags)
    with store.workspace("prepare", "f" * 64) as work:
        (work / "evaluation.arrow").write_bytes((dataset.path / "evaluation.arrow").read_bytes())
        kept = store.commit(dataset.model_copy(update={"path": work}), "prepare", "f" * 64)
    registry.client.set_model_version_tag(by_hand.name, "2", "qlora.data_digest", kept.digest)

    assert rows_of(registry, store, by_hand) == kept
    adopted = reopened(registry, tracker, by_hand, "flow-2")
    assert adopted.recipe == RECIPE
    assert adopted.parent_run_id != ours.parent_run_id
    assert reopened(registry, tracker, by_hand, "flow-3").parent_run_id == adopted.parent_run_id
    assert tracker.client.get_run(adopted.parent_run_id).info.status == "FINISHED"
    assert reopened(registry, tracker, registry.version(by_hand.name, 2), "flow-3").parent_run_id == ours.parent_run_id
    tracker.client.delete_run(ours.parent_run_id)
    with pytest.raises(RegistryError, match="run` a recipe of this name first"):
        reopened(registry, tracker, registry.version(by_hand.name, 2), "flow-3")


@pytest.mark.slow
def test_a_version_of_others_is_exported_and_looked_at_again(registry, by_hand, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "recipe", evaluation={"metrics": ["loss"]}))
    _, rows = prepared(recipe, registry.settings, ignore)
    tracker = Tracker(registry.settings)
    ours = tracker.begin(recipe, "flow-1", None)
    tags = {"qlora.parent_run": ours.parent_run_id, "qlora.data_digest": rows.digest}
    registry.client.create_model_version(by_hand.name, source="file:///nowhere", tags=tags)

    exported = export.fn(reopened(registry, tracker, by_hand, "flow-2"), by_hand, "nf4").result()
    after = registry.version(by_hand.name, 1)
    assert exported.model_digest == after.model_digest
    assert after.tags["qlora.export.nf4"] == exported.digest
    adopted = tracker.adopt(recipe, 1, "flow-3")
    first = recheck.fn(adopted, after, 0.1)
    assert (first.before, first.drifted) == (None, False)
    second = recheck.fn(adopted, registry.version(by_hand.name, 1), 0.1)
    assert (second.before, second.drifted) == (first.now, False)


PROOF = merge_proof()


@pytest.fixture(scope="module")
def dataset(model, tmp_path_factory) -> PreparedDataset:
    facts = Architecture(
        model_type="llama",
        layers=2,
        hidden=64,
        intermediate=128,
        heads=4,
        kv_heads=2,
        vocab=400,
        context_tokens=256,
        parameters=100_000,
        tied_embeddings=True,
    )
    base = ModelSnapshot(path=model, source="tiny", revision="1", architecture=facts)
    return prepare_rows(base, tmp_path_factory.mktemp("rows") / "here")
