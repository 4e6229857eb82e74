"""Versions that wait for a person, on a real MLflow database."""

import pytest

from qlora_core.artifacts import PromotionDecision
from qlora_core.errors import ChampionChangedError, RegistryError
from tasks import approval
from tasks.moves import Author
from tasks.registry import ModelRegistry
from tasks.repairing import repair_registry
from tasks.settings import Settings

ADA = Author(who="ada@desk", why="reads better")
DECISION = PromotionDecision(promote=True, gates=(), reason="2 gates of 2 passed")


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
    registry.client.create_registered_model(request.node.name)
    return request.node.name


def waiting(registry: ModelRegistry, name: str, digest: str = "a", compared_with: str = "none", hours: float = 1.0):
    tags = {"qlora.key": digest, "qlora.model_digest": digest, "qlora.compared_with": compared_with}
    number = int(registry.client.create_model_version(name, source="file:///nowhere", tags=tags).version)
    approval.ask(registry, registry.version(name, number), DECISION, hours)
    return registry.version(name, number)


def test_a_version_that_waits_serves_nobody(registry, name):
    version = waiting(registry, name)
    assert version.tags["qlora.verdict"] == "awaiting approval"
    assert registry.aliases(name) == {}


def test_asking_again_does_not_move_the_time_limit(registry, name):
    version = waiting(registry, name)
    approval.ask(registry, version, DECISION, 100.0)
    assert registry.version(name, version.number).tags["qlora.approve_before"] == version.tags["qlora.approve_before"]


def test_an_approved_version_is_champion_and_says_who_and_why(registry, name):
    version = waiting(registry, name)
    assert approval.answer(registry, version, True, ADA) == "promoted"
    tags = registry.version(name, version.number).tags
    assert registry.aliases(name) == {"champion": version.number}
    assert (tags["qlora.promoted_by"], tags["qlora.promoted_why"]) == ("ada@desk", "reads better")


def test_a_version_that_was_made_champion_by_hand_is_approved_as_it_is(registry, name):
    version = waiting(registry, name)
    registry.client.set_registered_model_alias(name, "champion", str(version.number))
    assert approval.answer(registry, version, True, ADA) == "promoted"
    assert registry.version(name, version.number).verdict == "promoted"


def test_a_declined_version_stays_what_it_is_and_cannot_be_approved_afterwards(registry, name):
    version = waiting(registry, name)
    assert approval.answer(registry, version, False, ADA) == "declined"
    declined = registry.version(name, version.number)
    assert (declined.tags["qlora.declined_by"], declined.why) == ("ada@desk", "reads better")
    assert declined.gate_summary == "2 gates of 2 passed"
    with pytest.raises(RegistryError, match="does not wait for approval: it is declined"):
        approval.answer(registry, declined, True, ADA)
    assert registry.aliases(name) == {}


def test_after_its_time_limit_a_version_is_not_promoted_any_more(registry, name):
    version = waiting(registry, name, hours=-1.0)
    with pytest.raises(RegistryError, match="had to be approved before"):
        approval.answer(registry, version, True, ADA)
    expired = registry.version(name, version.number)
    assert (expired.verdict, expired.gate_summary) == ("expired", "2 gates of 2 passed")
    assert registry.aliases(name) == {}


@pytest.mark.parametrize("limit", [None, "tomorrow"])
def test_a_version_whose_time_limit_was_lost_can_be_approved_and_is_given_a_new_one(registry, request, limit):
    name = request.node.name
    registry.client.create_registered_model(name)
    version = waiting(registry, name)
    if limit is None:
        registry.untag(version, "qlora.approve_before")
    else:
        registry.tag(version, {"qlora.approve_before": limit})
    said = [sentence for sentence in repair_registry(registry) if sentence.startswith(f"{name}:")]
    limited = registry.version(name, version.number)
    assert "waited without a time limit" in said[-1]
    assert 0 < approval.seconds_left(limited) <= 72 * 3600
    assert approval.answer(registry, version.model_copy(update={"tags": limited.tags}), True, ADA) == "promoted"


def test_reconcile_expires_what_nobody_answered_and_names_edits_by_hand(registry, name):
    version = waiting(registry, name, hours=-1.0)
    other = waiting(registry, name, digest="b")
    approval.answer(registry, other, True, ADA)
    registry.client.set_registered_model_alias(name, "champion", str(version.number))
    said = [sentence for sentence in repair_registry(registry) if sentence.startswith(f"{name}:")]
    assert said == [
        f"{name}: version {version.number} expired, nobody approved it in time",
        f"{name}: champion was set by hand to version {version.number} (it was version {other.number})",
    ]


def test_an_approval_that_comes_after_another_champion_is_refused_and_judged_again(registry, name):
    slow, quick = waiting(registry, name, "a"), waiting(registry, name, "b")
    approval.answer(registry, quick, True, ADA)
    with pytest.raises(ChampionChangedError, match="was compared with no champion"):
        approval.answer(registry, slow, True, ADA)
    assert registry.aliases(name) == {"champion": quick.number}
    assert "qlora.verdict" not in registry.version(name, slow.number).tags
