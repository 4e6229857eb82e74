"""What commands do with a team's servers, all in one set-up: the doctor. Nothing is mocked."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tasks.doctor import check, mlflow_server, prefect_server
from tasks.settings import Settings
from tests.integration.conftest import free_port, qlora
from tests.team import Team, team
from tests.tiny import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def us(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with team(tmp_path_factory.mktemp("team")) as running:
        running.ask("/work_pools/", name="gpu", type="process")
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(autouse=True)
def as_a_member(us: Team, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clients of these tests ask the servers as a member does."""
    for name, value in us.environment.items():
        if name.startswith(("MLFLOW_", "QLORA_", "PREFECT_API_")):
            monkeypatch.setenv(name, value)
    with as_member(us):
        yield


def as_member(us: Team, **changed: str):
    asked = {"PREFECT_API_URL": us.prefect_url, **us.environment, **changed}
    return temporary_settings(
        {PREFECT_API_URL: asked["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: asked["PREFECT_API_AUTH_STRING"]}
    )


def failure(checks: Iterator[check.Check]) -> check.Check:
    (found,) = [found for found in checks if found.status == "fail"]
    assert found.do
    return found


def test_the_doctor_misses_a_worker_and_is_content_when_there_is_one(us: Team, recipe: Path):
    deployed = qlora("deploy", recipe, environment=us.environment)
    assert deployed.returncode == 0, deployed.stderr
    alone = failure(prefect_server.examine())
    assert (alone.what, alone.do.partition("   ")[0]) == ("pool gpu", "prefect worker start --pool gpu --limit 1")

    us.ask("/work_pools/gpu/workers/heartbeat", name="one")  # as a worker says it
    said = qlora("doctor", "--json", environment=us.environment)
    assert said.returncode == 0, said.stdout + said.stderr
    found = {line["what"]: line for line in json.loads(said.stdout)}
    assert [line for line in found.values() if line["status"] == "fail"] == []
    servers = {"MLflow", "MLflow clock", "MLflow user", "object store", "Prefect", "Prefect clock", "pool gpu"}
    assert servers | {"versions", "disk"} <= {what for what, line in found.items() if line["status"] == "ok"}
    assert found["pool gpu"]["found"] == "1 deployments, workers online: one"


def test_the_doctor_leaves_no_file_behind(us: Team):
    assert [found.status for found in mlflow_server.examine(Settings()) if found.what == "object store"] == ["ok"]
    assert [key for key in us.objects() if key.endswith(mlflow_server.PROBE)] == []


@pytest.mark.parametrize(
    ("variable", "value", "what", "said"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "wrong", "MLflow user", "does not know this user"),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:{closed}", "MLflow", "does not answer"),
        ("MLFLOW_TRACKING_URI", "http://2130706433:{open}", "MLflow", "refuses this host name"),
        ("MLFLOW_TRACKING_URI", "{prefect}", "MLflow", "is no MLflow server"),
        ("PREFECT_API_AUTH_STRING", "team:wrong", "Prefect", "does not let us in (401)"),
        ("PREFECT_API_URL", "http://127.0.0.1:{closed}/api", "Prefect", "does not answer"),
    ],
    ids=["password", "no MLflow", "host name", "not MLflow", "password of Prefect", "no Prefect"],
)
def test_the_doctor_names_what_is_wrong_with_a_server(us: Team, monkeypatch, variable, value, what, said):
    value = value.format(closed=free_port(), open=urlsplit(us.mlflow_url).port, prefect=us.prefect_url[:-4])
    monkeypatch.setenv(variable, value)
    with as_member(us, **{variable: value}):
        found = failure(prefect_server.examine() if what == "Prefect" else mlflow_server.examine(Settings()))
    assert found.what == what
    assert said in found.found, found


def test_the_doctor_wants_the_extension_that_prefect_needs(us: Team, monkeypatch):
    import psycopg

    from tasks.doctor import databases

    monkeypatch.setenv("MLFLOW_TRACKING_URI", us.mlflow_url)
    url = f"postgresql+asyncpg://{us.database.rpartition('//')[2]}/prefect"
    monkeypatch.setenv(databases.PREFECT_DATABASE, url)
    (found,) = databases.examine(Settings())
    assert (found.status, found.found.rpartition(" is ")[2]) == ("ok", "up to date")
    with psycopg.connect(us.database.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
        connection.execute("CREATE TABLE alembic_version AS SELECT 'anything' AS version_num")
    monkeypatch.setenv(databases.PREFECT_DATABASE, url.removesuffix("prefect") + "postgres")
    assert "lacks pg_trgm" in failure(databases.examine(Settings())).found


def test_the_doctor_notices_that_the_object_store_is_down(us: Team):
    """The last one here: nothing starts it again."""
    (store,) = [child for child in psutil.Process().children() if Path(child.cmdline()[0]).name == "weed"]
    store.kill()
    found = failure(mlflow_server.examine(Settings()))
    assert (found.what, found.found.partition(":")[0]) == ("object store", "cannot write")
