"""A Prefect server that is away when a command starts is a message, not a traceback."""

import os
from pathlib import Path

import pytest

from tests.commands import qlora
from tests.tiny import write_recipe

AWAY = "http://127.0.0.1:9/api"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


SLOW = [pytest.param(name, marks=pytest.mark.minutes) for name in ("deploy", "data publish", "notify", "serve-flows")]


@pytest.mark.parametrize("command", ["run", "reconcile", *SLOW])
def test_a_prefect_server_that_is_away_at_the_start_is_said_in_words(command, recipe, tmp_path):
    arguments = {"reconcile": [], "notify": ["slack-webhook/team"]}.get(command, [recipe])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    environment = {**kept, "QLORA_HOME": str(tmp_path / "home"), "PREFECT_API_URL": AWAY}
    result = qlora(*command.split(), *arguments, environment=environment)
    assert "Traceback" not in result.stdout + result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"Prefect at {AWAY} does not answer" in said, "what happened"
    assert "is kept" in said, "what is safe"
    assert "Start it, or correct PREFECT_API_URL" in said, "what to type"
    assert result.returncode == 1
