"""Hands in the registry: any of our tags may be missing or hold any text, and every command still answers."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from unittest.mock import patch

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.cli import app
from qlora_core.errors import QloraError
from qlora_core.store import Store
from tasks import approval, moves
from tasks.comparing import trace
from tasks.foreign import reopened, rows_of, with_digest
from tasks.moves import Author
from tasks.registry import ModelRegistry
from tasks.repairing import repair_registry
from tasks.settings import Settings
from tasks.tags import read
from tasks.tracking import Tracker
from tasks.unchanged import _is_over

NAME = "painter"
GATES = Author(who="the gates", why="2 gates of 2 passed")
OURS = (
    "qlora.key",
    "qlora.verdict",
    "qlora.reason",
    "qlora.model_digest",
    "qlora.data_digest",
    "qlora.scores",
    "qlora.other_scores",
    "qlora.compared_with",
    "qlora.parent_run",
    "qlora.approve_before",
    "qlora.approval_run",
    "qlora.report",
    "qlora.base",
    "qlora.promoted_by",
    "qlora.promoted_why",
    "qlora.promoted_at",
    "qlora.rolled_back_at",
    "qlora.declined_at",
    "qlora.event.then",
)
MOVE = {"kind": "promotion", "before": {}, "after": {"champion": 2}, "tags": {"2": {"qlora.verdict": "promoted"}}}
VALUES = st.one_of(
    st.text(max_size=40),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ).map(json.dumps),
    st.sampled_from(
        [
            "",
            "promoted",
            "awaiting approval",
            "none",
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
            "2026-12-01 10:00",
            '{"champion": 99999999999999999999}',
            '{"champion": 7, "previous": 1}',
            "[" * 5000,
            json.dumps(MOVE),
            json.dumps({**MOVE, "after": {"champion": 9}}),
            json.dumps({**MOVE, "after": {"previous": 1}}),
            json.dumps({**MOVE, "tags": {"9": {"qlora.verdict": "promoted"}, "2": {"qlora.x": "y"}}}),
            json.dumps({**MOVE, "tags": {"2": {"not our tag": "y"}}}),
        ]
    ),
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Iterator[ModelRegistry]:
    home = tmp_path_factory.mktemp("home")
    (home / "mlflow").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    with patch.dict(os.environ, {**kept, "QLORA_HOME": str(home)}, clear=True):
        yield ModelRegistry(Settings())


def add(registry: ModelRegistry, name: str, digest: str) -> int:
    tags = {"qlora.key": digest, "qlora.model_digest": digest, "qlora.scores": '{"loss": 0.5}'}
    return int(registry.client.create_model_version(name, source="file:///nowhere", tags=tags).version)


def three_versions(registry: ModelRegistry, name: str) -> None:
    """Version 2 is champion, version 1 previous, version 3 waits for approval."""
    registry.client.create_registered_model(name)
    for digest in "abc":
        add(registry, name, digest)
    moves.promote(registry, name, 1, None, GATES, GATES.why)
    moves.promote(registry, name, 2, "a", GATES, GATES.why)
    decision = approval.PromotionDecision(promote=True, gates=(), reason=GATES.why)
    registry.tag(registry.version(name, 3), {"qlora.compared_with": "b"})
    approval.ask(registry, registry.version(name, 3), decision, 1.0)


def invoke(*arguments: str) -> Result:
    with patch.dict(os.environ):
        return CliRunner().invoke(app, arguments)


def answers(*arguments: str) -> str:
    """What a command prints; it may refuse in words, and must not fail over what it reads."""
    result = invoke(*arguments)
    assert result.exception is None or isinstance(result.exception, QloraError | SystemExit), repr(result.exception)
    return result.output + str(result.exception or "")


@settings(
    max_examples=int(os.environ.get("QLORA_FUZZ_EXAMPLES", "12")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    of_versions=st.dictionaries(
        st.tuples(st.integers(1, 3), st.sampled_from(OURS)), st.none() | VALUES, min_size=1, max_size=6
    ),
    of_model=st.dictionaries(st.sampled_from(["qlora.move", "qlora.aliases", "qlora.retraining"]), VALUES, max_size=3),
    number=st.integers(0, 10**9),
)
def test_every_command_answers_whatever_our_tags_hold_and_reconcile_repairs_them(
    registry, of_versions, of_model, number
):
    name = f"fuzzed-{number}-{os.urandom(4).hex()}"
    three_versions(registry, name)
    for (version, tag), text in of_versions.items():
        if text is None:
            if tag in registry.client.get_model_version(name, str(version)).tags:
                registry.client.delete_model_version_tag(name, str(version), tag)
        else:
            registry.client.set_model_version_tag(name, str(version), tag, text)
    for tag, text in of_model.items():
        registry.client.set_registered_model_tag(name, tag, text)
    for command in (
        ("models", name),
        ("models", name, "--json"),
        ("lineage", f"{name}@3"),
        ("compare", f"{name}@champion", f"{name}@3"),
        ("approve", f"{name}@3", "--reason", "reads better"),
        ("promote", f"{name}@3", "--force"),
        ("rollback", name),
        ("chat", f"{name}@2"),
    ):
        answers(*command)
    for ask in (
        lambda version: with_digest(registry, version),
        lambda version: rows_of(registry, Store(registry.settings.store), version),
        lambda version: reopened(registry, Tracker(registry.settings), version, "flow-1"),
        lambda version: _is_over(registry, version.tags.get("qlora.parent_run", "")),
        lambda version: trace(registry, version).model_dump_json(),
        approval.describe,
    ):
        for version in registry.versions(name):
            with suppress(QloraError):  # refused in words
                ask(version)
    repair_registry(registry)
    (model,) = [model for model in registry.models() if model.name == name]
    assert model.misread == {}
    assert [version.misread for version in registry.versions(name)] == [{}, {}, {}]
    registry.client.delete_registered_model(name)


def test_a_tag_that_is_not_understood_is_named_once_and_counts_as_absent(registry, caplog):
    three_versions(registry, NAME)
    registry.client.set_model_version_tag(NAME, "2", "qlora.scores", "very good")
    with caplog.at_level(logging.WARNING, "qlora"):
        for _ in range(2):
            assert registry.version(NAME, 2).scores == {}
    assert [record.getMessage() for record in caplog.records] == [
        f"{NAME} version 2: the tag qlora.scores holds 'very good', which is not a JSON object of numbers; it counts "
        "as absent, and `qlora reconcile` repairs it"
    ]
    said = repair_registry(registry)
    assert f"{NAME}: the tag qlora.scores of version 2 was removed, it held 'very good'" in said
    assert registry.client.get_model_version(NAME, "2").tags.get("qlora.scores") is None


def test_aliases_that_cannot_be_read_are_written_down_again_as_they_are(registry):
    name = "forgotten"
    three_versions(registry, name)
    registry.client.set_registered_model_tag(name, "qlora.aliases", "version 2, I think")
    registry.client.set_registered_model_tag(name, "qlora.move", "{}")
    said = [sentence for sentence in repair_registry(registry) if sentence.startswith(name)]
    assert said == [
        f"{name}: the tag qlora.aliases says again which aliases are meant (champion version 2, previous version 1); "
        "it held 'version 2, I think'",
        f"{name}: the tag qlora.move was removed, it held '{{}}'; the aliases stay as they are",
    ]
    assert registry.aliases(name) == {"champion": 2, "previous": 1}
    registry.client.set_registered_model_alias(name, "champion", "1")
    assert "(it was version 2)" in moves.edits_by_hand(registry, name)[0]


def test_a_model_that_cannot_be_repaired_stops_only_itself(registry, monkeypatch):
    """Its lock is held by somebody else all the time."""
    for name in ("apple", "stuck", "zebra"):
        three_versions(registry, name)
        registry.client.set_registered_model_tag(name, "qlora.aliases", "?")
    from tasks.locks import registry_lock

    monkeypatch.setattr("tasks.locks.PATIENCE_S", 0.2)
    held = registry_lock(registry.settings, "stuck")
    with held:
        said = repair_registry(registry)
    assert [model.misread for model in registry.models() if model.name in ("apple", "stuck", "zebra")] == [
        {},
        {"qlora.aliases": "?"},
        {},
    ]
    assert any(
        sentence.startswith("stuck: nothing more could be done for this model: others have been changing")
        for sentence in said
    )


def test_one_bad_tag_on_one_model_is_said_and_all_models_are_shown(registry):
    for name in ("first-of-all", "second"):
        three_versions(registry, name)
    registry.client.set_registered_model_tag("first-of-all", "qlora.aliases", "{broken")
    shown = answers("models")
    assert "first-of-all" in shown
    assert "second" in shown


def test_tags_of_others_are_left_alone():
    tags = {"owner": "{", "mlflow.x": "?", "qlora.of_a_later_release": "{", "qlora.key": "not a key"}
    assert read(tags, "painter").misread == {"qlora.key": "not a key"}
