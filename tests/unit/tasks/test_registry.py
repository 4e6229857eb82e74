"""The registry on a real MLflow database."""

import pytest

from qlora_core.errors import RegistryError
from tasks.registry import ModelRegistry
from tasks.settings import Settings

NAME = "painter"


@pytest.fixture(scope="module")
def registry(tmp_path_factory, request) -> ModelRegistry:
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path_factory.mktemp("home")
    (home / "mlflow").mkdir()
    return ModelRegistry(Settings(home=home))


@pytest.fixture
def name(registry, request) -> str:
    name = f"{NAME}-{request.node.name}"
    registry.client.create_registered_model(name)
    return name


def add(registry: ModelRegistry, name: str, digest: str) -> int:
    tags = {"qlora.key": digest, "qlora.model_digest": digest}
    return int(registry.client.create_model_version(name, source="file:///nowhere", tags=tags).version)


def test_a_model_that_does_not_exist_has_no_versions_and_no_champion(registry):
    assert registry.versions("nobody") == []
    assert registry.at_alias("nobody", "champion") is None
    assert registry.find("nobody", "k") is None


def test_promotion_moves_the_champion_and_remembers_the_previous_one(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    registry.promote(name, one, compared_with=None)
    registry.promote(name, two, compared_with="a")
    assert registry.aliases(name) == {"champion": two, "previous": one}


def test_promotion_is_refused_when_the_champion_is_not_the_one_compared_with(registry, name):
    one, two, three = (add(registry, name, digest) for digest in "abc")
    registry.promote(name, one, compared_with=None)
    registry.promote(name, two, compared_with="a")
    with pytest.raises(RegistryError, match=f"champion is now version {two}. Nothing was changed"):
        registry.promote(name, three, compared_with="a")
    assert registry.aliases(name)["champion"] == two


def test_promoting_the_champion_again_changes_nothing(registry, name):
    one = add(registry, name, "a")
    registry.promote(name, one, compared_with=None)
    registry.promote(name, one, compared_with=None)
    assert registry.aliases(name) == {"champion": one}


def test_rollback_swaps_champion_and_previous(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    registry.promote(name, one, compared_with=None)
    with pytest.raises(RegistryError, match="no earlier champion"):
        registry.rollback(name)
    registry.promote(name, two, compared_with="a")
    assert registry.rollback(name) == (two, one)
    assert registry.aliases(name) == {"champion": one, "previous": two}


def test_a_version_is_found_by_what_it_was_judged_as(registry, name):
    number = add(registry, name, "a")
    registry.decide(name, number, "rejected", "1 of 2 gates failed")
    found = registry.find(name, "a")
    assert found.number == number
    assert found.tags["qlora.verdict"] == "rejected"
