"""The registry on a real MLflow database."""

import multiprocessing
import os
import signal

import pytest
from mlflow import MlflowClient

from qlora_core.errors import ChampionChangedError, NotRegisteredError, RegistryError
from tasks import moves
from tasks.comparing import trace
from tasks.moves import Author, edits_by_hand
from tasks.registry import ModelRegistry
from tasks.settings import Settings

AUTHOR = Author(who="someone@here", why="it is better")
WRITES = (
    "set_registered_model_tag",
    "delete_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "update_model_version",
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, request) -> Settings:
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path_factory.mktemp("home")
    (home / "mlflow").mkdir()
    return Settings(home=home)


@pytest.fixture(scope="module")
def registry(settings) -> ModelRegistry:
    return ModelRegistry(settings)


@pytest.fixture
def name(registry, request) -> str:
    name = request.node.name.replace("[", "-").replace("]", "")
    registry.client.create_registered_model(name)
    return name


def add(registry: ModelRegistry, name: str, digest: str) -> int:
    """A version whose model has this digest, registered under the same name once more or for the first time."""
    tags = {"qlora.key": digest, "qlora.model_digest": digest}
    return int(registry.client.create_model_version(name, source="file:///nowhere", tags=tags).version)


def promote(registry: ModelRegistry, name: str, number: int, compared_with: str | None) -> None:
    moves.promote(registry, name, number, compared_with, AUTHOR, "2 gates of 2 passed")


def test_a_model_that_does_not_exist_has_no_versions_and_no_champion(registry):
    assert registry.versions("nobody") == []
    assert registry.at_alias("nobody", "champion") is None
    assert registry.find("nobody", "k") is None


def test_promotion_moves_the_champion_and_remembers_the_previous_one_and_who_did_it(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, two, compared_with="a")
    assert registry.aliases(name) == {"champion": two, "previous": one}
    tags = registry.version(name, two).tags
    assert (tags["qlora.verdict"], tags["qlora.promoted_by"]) == ("promoted", "someone@here")
    assert registry.client.get_model_version(name, str(two)).description == "promoted: 2 gates of 2 passed"


def test_promotion_is_refused_when_the_champion_is_not_the_one_compared_with(registry, name):
    one, two, three = (add(registry, name, digest) for digest in "abc")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, two, compared_with="a")
    with pytest.raises(RegistryError, match=f"champion is now version {two}. Nothing was changed"):
        promote(registry, name, three, compared_with="a")
    assert registry.aliases(name)["champion"] == two


def test_promoting_the_champion_again_changes_nothing(registry, name):
    one = add(registry, name, "a")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, one, compared_with=None)
    assert registry.aliases(name) == {"champion": one}


def test_rollback_swaps_champion_and_previous_and_says_why(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    with pytest.raises(RegistryError, match="no earlier champion"):
        moves.rollback(registry, name, AUTHOR)
    promote(registry, name, two, compared_with="a")
    assert moves.rollback(registry, name, Author(who="me", why="it is rude")) == (two, one)
    assert registry.aliases(name) == {"champion": one, "previous": two}
    tags = registry.version(name, two).tags
    assert (tags["qlora.verdict"], tags["qlora.rolled_back_why"]) == ("rolled back", "it is rude")
    assert registry.client.get_model_version(name, str(two)).description == "rolled back: it is rude"


def test_what_the_gates_said_and_what_people_say_are_kept_apart_through_rollbacks(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, two, compared_with="a")
    for why in ("it is rude", "it is too short"):
        moves.rollback(registry, name, Author(who="me", why=why))
        rolled_back = registry.version(name, two)
        assert (rolled_back.gate_summary, rolled_back.why) == ("2 gates of 2 passed", why)
        moves.promote(registry, name, two, "a", Author(who="me", why="we need it"), rolled_back.gate_summary)
        again = registry.version(name, two)
        assert (again.tags["qlora.reason"], again.tags["qlora.promoted_why"]) == ("2 gates of 2 passed", "we need it")
    history = trace(registry, again).history
    assert [(event.what, event.by, event.why) for event in history] == [
        ("promoted", "someone@here", "it is better"),
        ("rolled_back", "me", "it is rude"),
        ("promoted", "me", "we need it"),
        ("rolled_back", "me", "it is too short"),
        ("promoted", "me", "we need it"),
    ]


def test_the_words_of_a_rollback_by_an_earlier_release_are_not_taken_for_those_of_the_gates(registry, name):
    words = {"qlora.verdict": "rolled back", "qlora.reason": "it is rude", "qlora.rolled_back_why": "it is rude"}
    registry.client.create_model_version(name, source="file:///nowhere", tags={"qlora.model_digest": "a", **words})
    version = registry.version(name, 1)
    assert (version.gate_summary, version.why) == ("", "it is rude")


def test_the_champions_own_model_is_promoted_again_under_other_gates(registry, name):
    """Its gates or metrics were changed, so it is a new version, and was compared with the one that it replaced."""
    one, two, three, four = (add(registry, name, digest) for digest in "abbb")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, two, compared_with="a")
    promote(registry, name, three, compared_with="a")
    assert registry.aliases(name) == {"champion": three, "previous": one}
    promote(registry, name, four, compared_with="a")
    assert registry.aliases(name) == {"champion": four, "previous": one}
    assert moves.rollback(registry, name, AUTHOR) == (four, one)


def test_a_champion_of_unknown_digest_is_not_taken_for_none(registry, name):
    two = add(registry, name, "b")
    by_hand = int(registry.client.create_model_version(name, source="file:///nowhere").version)
    registry.client.set_registered_model_alias(name, "champion", str(by_hand))
    with pytest.raises(ChampionChangedError, match=f"the champion is now version {by_hand}"):
        promote(registry, name, two, compared_with=None)
    promote(registry, name, two, compared_with=registry.version(name, by_hand).identity)
    assert registry.aliases(name) == {"champion": two, "previous": by_hand}


def test_a_rollback_whose_champion_was_removed_by_hand_says_what_to_type(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, two, compared_with="a")
    registry.client.delete_registered_model_alias(name, "champion")
    with pytest.raises(RegistryError) as refusal:
        moves.rollback(registry, name, AUTHOR)
    assert str(refusal.value) == (
        f"{name} has no champion: its alias was removed by hand from version {two}. Version {one} is previous. A "
        f"rollback swaps both, so it needs both. Type `qlora promote {name}@{two}` or `qlora promote {name}@{one}` to "
        "make that version champion. Nothing was changed"
    )
    promote(registry, name, two, compared_with=None)
    assert registry.aliases(name) == {"champion": two, "previous": one}


def test_an_edit_by_hand_is_undone_or_accepted_by_what_is_offered(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, two, compared_with="a")
    assert moves.remedy(registry, registry.model(name)) is None
    registry.client.set_registered_model_alias(name, "champion", str(one))
    assert moves.remedy(registry, registry.model(name)) == (
        f"`qlora promote {name}@{two}` makes version {two} champion again; `qlora promote {name}@{one}` accepts "
        f"version {one}"
    )
    promote(registry, name, one, compared_with=None)
    assert edits_by_hand(registry, name) == []
    registry.client.delete_registered_model_alias(name, "champion")
    assert (
        moves.remedy(registry, registry.model(name))
        == f"`qlora promote {name}@{one}` makes version {one} champion again"
    )
    promote(registry, name, one, compared_with=None)
    assert (edits_by_hand(registry, name), moves.remedy(registry, registry.model(name))) == ([], None)


@pytest.mark.parametrize("quoted", ["it's", 'the "best"', 'it\'s the "best"'])
def test_a_model_with_quotes_in_its_name_is_found(registry, quoted):
    registry.client.create_registered_model(quoted)
    registry.client.create_registered_model(quoted.replace("'", "_") + "2")
    number = add(registry, quoted, "a")
    promote(registry, quoted, number, compared_with=None)
    assert [version.number for version in registry.versions(quoted)] == [number]
    assert registry.find(quoted, "a").number == number
    assert registry.resolve(quoted).aliases == ("champion",)


def test_a_name_that_does_not_exist_is_answered_with_the_nearest_one(registry):
    registry.client.create_registered_model("painter-of-cups")
    promote(registry, "painter-of-cups", add(registry, "painter-of-cups", "a"), compared_with=None)
    for reference, answer in (
        ("pianter-of-cups", "there is no model pianter-of-cups; did you mean painter-of-cups?"),
        ("painter-of-cups@champoin", "painter-of-cups has no alias champoin; did you mean champion?"),
        ("painter-of-cups@7", "painter-of-cups has no version 7; it has 1"),
        (f"painter-of-cups@{10**30}", f"painter-of-cups has no version {10**30}; it has 1"),
    ):
        with pytest.raises(NotRegisteredError) as refusal:
            registry.resolve(reference)
        assert (str(refusal.value), refusal.value.exit_code) == (answer, 2)


def test_a_version_is_found_by_what_it_was_judged_as(registry, name):
    number = add(registry, name, "a")
    registry.decide(name, number, "rejected", "1 of 2 gates failed")
    found = registry.find(name, "a")
    assert found.number == number
    assert found.tags["qlora.verdict"] == "rejected"


def test_a_version_that_an_alias_points_at_is_not_deleted(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    with pytest.raises(RegistryError, match="is champion; promote another version"):
        registry.delete(name, one)
    registry.delete(name, two)
    assert [version.number for version in registry.versions(name)] == [one]
    with pytest.raises(RegistryError, match=f"no version {two}; it has {one}"):
        registry.delete(name, two)


def test_aliases_set_in_the_mlflow_ui_are_noticed(registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    promote(registry, name, two, compared_with="a")
    assert edits_by_hand(registry, name) == []
    registry.client.set_registered_model_alias(name, "champion", str(one))
    assert edits_by_hand(registry, name) == [
        f"{name}: champion was set by hand to version {one} (it was version {two})"
    ]
    registry.client.delete_model_version(name, str(one))
    assert edits_by_hand(registry, name) == [
        f"{name}: champion was set by hand to nothing (it was version {two})",
        f"{name}: previous was set by hand to nothing (it was version {one}, which was deleted)",
    ]


class DyingClient(MlflowClient):
    """Kills its own process, as the kernel would, just before a certain write."""

    def __init__(self, uri: str, writes_left: int) -> None:
        super().__init__(uri)
        for method in WRITES:
            setattr(self, method, self._counted(getattr(self, method)))
        self.writes_left = writes_left

    def _counted(self, write):
        def call(*args, **kwargs):
            if self.writes_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.writes_left -= 1
            return write(*args, **kwargs)

        return call


def move_and_die(settings: Settings, move: str, name: str, writes: int) -> None:
    registry = ModelRegistry(settings, DyingClient(settings.mlflow_uri, writes))
    if move == "promotion":
        promote(registry, name, 2, compared_with="a")
    else:
        moves.rollback(registry, name, AUTHOR)


def killed_after(settings: Settings, move: str, name: str, writes: int) -> bool:
    """Whether the process died on the way; if not, the move has fewer writes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.moves"])
    process = context.Process(target=move_and_die, args=(settings, move, name, writes))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("move", ["promotion", "rollback"])
def test_killed_between_any_two_steps_the_move_is_finished_by_repair(settings, registry, move):
    writes, killed = 0, True
    while killed:
        name = f"killed-{move}-{writes}"
        registry.client.create_registered_model(name)
        one, two = add(registry, name, "a"), add(registry, name, "b")
        registry.client.set_registered_model_alias(name, "challenger", str(two))
        promote(registry, name, one, compared_with=None)
        if move == "rollback":
            promote(registry, name, two, compared_with="a")
        before = registry.aliases(name)
        killed = killed_after(settings, move, name, writes)
        assert "champion" in registry.aliases(name), "servers were left without a champion"
        said = moves.repair(registry, name)
        after = {"champion": two, "previous": one} if move == "promotion" else {"champion": one, "previous": two}
        begun = writes > 0
        assert registry.aliases(name) == (after if begun else before)
        assert (said is None) == (not begun or not killed)
        assert moves.repair(registry, name) is None
        assert edits_by_hand(registry, name) == []
        writes += 1
    assert writes > 8, "the moves have more steps than were cut"


def test_a_move_cut_short_whose_version_is_gone_is_taken_back(settings, registry, name):
    one, two = add(registry, name, "a"), add(registry, name, "b")
    promote(registry, name, one, compared_with=None)
    assert killed_after(settings, "promotion", name, writes=3)
    assert registry.aliases(name) == {"champion": two, "previous": one}
    registry.client.delete_model_version(name, str(two))
    assert moves.repair(registry, name) == (
        f"{name}: the promotion that was cut short was taken back, version {two} is gone"
    )
    assert registry.aliases(name) == {"champion": one}


def test_the_next_promotion_finishes_the_one_that_was_cut_short(settings, registry, name):
    one, two, three = (add(registry, name, digest) for digest in "abc")
    promote(registry, name, one, compared_with=None)
    assert killed_after(settings, "promotion", name, writes=1)
    promote(registry, name, three, compared_with="b")
    assert registry.aliases(name) == {"champion": three, "previous": two}
