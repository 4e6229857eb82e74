"""A registry that fails on the way: nothing is promoted by accident, and the same call ends it later."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from qlora_core.errors import RegistryUnavailableError
from tasks import moves
from tasks.failures import explain
from tasks.moves import Author
from tasks.registry import ModelRegistry, Version
from tasks.settings import Settings
from tests.faulty import FaultyServer, faulty
from tests.postgres import create_database, postgres
from tests.servers import mlflow_server
from tests.tiny import write_model

NAME = "painter"
AUTHOR = Author(who="flow 1", why="its gates passed")
STEPS = {
    "making the version": "model-versions/create",
    "its first alias": '"challenger"',
    "announcing the promotion": "qlora.move",
    "the champion": '"champion"',
    "its verdict": "model-versions/set-tag",
}
CASES = [("500", step) for step in STEPS]
CASES += [(how, step) for how in ("timeout", "down") for step in ("making the version", "the champion")]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[FaultyServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as uri, faulty(uri) as server:
        yield server


@pytest.fixture
def registry(server, tmp_path, monkeypatch) -> ModelRegistry:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    server.work_again()
    return ModelRegistry(Settings(home=tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def register_and_promote(registry: ModelRegistry, name: str, run_id: str, folder: Path) -> Version:
    version = registry.register(name, "key", run_id, folder, [], {"qlora.model_digest": "a"})
    moves.promote(registry, name, version.number, None, AUTHOR, "2 gates of 2 passed")
    return registry.version(name, version.number)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "step"), CASES)
def test_a_server_that_fails_on_the_way_is_reported_and_the_same_call_ends_it_later(
    registry, server, folder, how, step
):
    name = f"{NAME} {how} {step}"
    run_id = registry.client.create_run(registry.client.create_experiment(name)).info.run_id
    server.fail(how, STEPS[step])
    with pytest.raises(MlflowException) as failure:
        register_and_promote(registry, name, run_id, folder)
    said = explain(failure.value, registry.settings.mlflow_uri)
    assert isinstance(said, RegistryUnavailableError)
    assert server.url in str(said)
    server.work_again()
    promoted = step == "its verdict"
    assert ("champion" in registry.aliases(name)) == promoted, "an alias moved before or after its time"

    version = register_and_promote(registry, name, run_id, folder)
    assert [found.number for found in registry.versions(name)] == [1]
    assert registry.aliases(name) == {"champion": 1}
    assert version.tags["qlora.verdict"] == "promoted"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres() as server:
        yield create_database(server, "mlflow")


@pytest.mark.slow
@pytest.mark.parametrize("table", ["model_versions", "registered_model_tags", "registered_model_aliases"])
def test_a_store_that_becomes_read_only_on_the_way_is_reported_and_the_same_call_ends_it_later(
    database, tmp_path, monkeypatch, folder, table
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    registry = ModelRegistry(Settings(home=tmp_path))
    location = (tmp_path / "files").as_uri()
    run_id = registry.client.create_run(registry.client.create_experiment(table, location)).info.run_id
    with psycopg.connect(database.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
            "'cannot execute INSERT in a read-only transaction' USING ERRCODE = 'read_only_sql_transaction'; END $$"
        )
        connection.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} EXECUTE FUNCTION refuse()")
        with pytest.raises((MlflowException, SQLAlchemyError)) as failure:
            register_and_promote(registry, table, run_id, folder)
        said = explain(failure.value, database)
        assert isinstance(said, RegistryUnavailableError)
        assert "read-only transaction" in str(said)
        connection.execute(f"DROP TRIGGER refuse ON {table}")
    assert "champion" not in registry.aliases(table)
    register_and_promote(registry, table, run_id, folder)
    assert registry.aliases(table) == {"champion": 1}
    assert [found.number for found in registry.versions(table)] == [1]
