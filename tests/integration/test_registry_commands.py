"""What people type about versions, against a real registry, and a copy to another server."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from qlora_core.errors import QloraError
from tasks import moves
from tasks.moves import Author
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tests.servers import mlflow_server
from tests.tiny import write_model

NAME = "painter"
AUTHOR = Author(who="flow 1", why="its gates passed")
EXAMPLE = [{"role": "user", "content": "Paint the cup red."}]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[ModelRegistry]:
    """Version 1 is champion, version 2 was rejected; only version 1 has files."""
    home = tmp_path / "home"
    (home / "mlflow").mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    with patch.dict(os.environ, {**kept, "QLORA_HOME": str(home)}, clear=True):
        registry = ModelRegistry(Settings())
        experiment = registry.client.create_experiment(NAME, (home / "mlflow" / "artifacts").as_uri())
        run_id = registry.client.create_run(experiment).info.run_id
        scores = {"qlora.scores": json.dumps({"loss": 0.5}), "qlora.data_digest": "d"}
        folder = write_model(tmp_path / "model")
        registry.register(NAME, "one", run_id, folder, EXAMPLE, {"qlora.model_digest": "a", **scores})
        moves.promote(registry, NAME, 1, None, AUTHOR, "2 gates of 2 passed")
        tags = {"qlora.key": "two", "qlora.model_digest": "b", "qlora.scores": json.dumps({"loss": 0.75})}
        registry.client.create_model_version(NAME, source="file:///nowhere", tags=tags)
        registry.decide(NAME, 2, "rejected", "1 of 2 gates failed")
        yield registry


def invoke(*arguments: str) -> Result:
    """A command in this process; MLflow leaves its address in the environment, which a process would take along."""
    with patch.dict(os.environ):
        return CliRunner().invoke(app, arguments)


def typed(*arguments: str) -> str:
    """What the command prints."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def refused(*arguments: str) -> str:
    """What the command says in its only line when it refuses."""
    result = invoke(*arguments)
    assert isinstance(result.exception, QloraError), result.output
    return str(result.exception)


@pytest.mark.slow
def test_versions_are_compared_promoted_rolled_back_and_deleted_from_a_terminal(registry):
    compared = json.loads(typed("compare", f"{NAME}@champion", f"{NAME}@2", "--json"))
    assert (compared["scores"], compared["same_rows"]) == ({"loss": [0.5, 0.75]}, False)
    assert "do not compare" in typed("compare", f"{NAME}@champion", f"{NAME}@2")
    assert "has no version 9; it has 2, 1" in refused("lineage", f"{NAME}@9")
    for command in (("models", "pianter"), ("models", "pianter", "--json"), ("rollback", "pianter")):
        assert refused(*command) == "there is no model pianter; did you mean painter?"
        assert invoke(*command).exception.exit_code == 2

    assert "is rejected (1 of 2 gates failed)" in refused("promote", f"{NAME}@2")
    assert registry.aliases(NAME) == {"champion": 1}
    forced = json.loads(typed("promote", f"{NAME}@2", "--force", "--reason", "we need it", "--json"))
    assert forced["aliases"] == {"champion": 2, "previous": 1}
    assert forced["version"]["tags"]["qlora.promoted_why"] == "we need it"
    why = "we do not, since those who use it say that its answers are shorter than they were"
    assert "version 1 is champion again" in typed("rollback", NAME, "--reason", why)
    assert why in typed("lineage", f"{NAME}@2")
    assert "1 of 2 gates failed" in json.loads(typed("models", NAME, "--json"))[0]["tags"]["qlora.reason"]

    assert "is previous; promote another version" in refused("delete", f"{NAME}@2")
    assert "does not wait for approval" in refused("approve", f"{NAME}@1")
    registry.client.create_model_version(NAME, source="file:///nowhere", tags={"qlora.key": "three"})
    assert f"{NAME} version 3 is deleted" in typed("delete", f"{NAME}@3")
    assert [version.number for version in registry.versions(NAME)] == [2, 1]

    registry.client.set_registered_model_alias(NAME, "champion", "2")
    assert "champion was set by hand to version 2 (it was version 1)" in typed("models")
    assert "version 2 is champion, and also previous" in refused("rollback", NAME)
    registry.client.set_registered_model_alias(NAME, "previous", "1")
    back = invoke("rollback", NAME, "--json")
    assert "champion was set by hand to version 2 (it was version 1)" in back.stderr
    assert json.loads(back.stdout)["aliases"] == {"champion": 1, "previous": 2}


@pytest.mark.slow
def test_a_version_is_copied_once_to_another_server_with_files_scores_and_lineage(registry, tmp_path, monkeypatch):
    with mlflow_server(tmp_path / "production") as uri:
        for _ in range(2):
            copied = json.loads(typed("copy", f"{NAME}@champion", "--to", uri, "--json"))
            assert copied["aliases"] == {"challenger": 1}
        elsewhere = ModelRegistry(Settings(home=tmp_path / "elsewhere", MLFLOW_TRACKING_URI=uri))
        (version,) = elsewhere.versions(NAME)
        assert (version.aliases, version.scores) == (("challenger",), {"loss": 0.5})
        assert version.tags["qlora.copied_from"].endswith(f"{NAME} version 1")
        assert version.tags["qlora.model_digest"] == "a"
        assert "qlora.verdict" not in version.tags
        files = elsewhere.fetch(version, tmp_path / "fetched")
        assert (files / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
        assert elsewhere.example(version) == EXAMPLE
        assert "another registry" in refused("copy", f"{NAME}@champion", "--to", registry.settings.mlflow_uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert "is champion" in typed("promote", f"{NAME}@1")
        assert elsewhere.aliases(NAME) == {"champion": 1}
