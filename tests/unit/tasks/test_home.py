"""A home is made once, whole, at any place, by any number of commands, killed at any moment."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from qlora_core.errors import StoreError
from tasks.databases import mlflow_database, prefect_database
from tasks.doctor import home as home_check
from tasks.fetching import model_folder
from tasks.home import open_home
from tasks.processes import this_process
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tasks.tracking import Tracker
from tests.tiny import write_model

PATIENCE_S = 600
MOMENTS_S = (0.0, 0.6, 3.0)
"""After the first sign of a database; the first two broke homes for good when MLflow made it in its place."""


@pytest.fixture(autouse=True)
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "PREFECT_", "QLORA_"))]:
        monkeypatch.delenv(name)


def at(home: Path) -> Settings:
    """As a new process reads them: `mlflow.set_tracking_uri` changes the environment of this one."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return Settings(home=home)


def start(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A command of a user who has just installed the program."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    environment = {**os.environ, "QLORA_HOME": str(home)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out + err


@pytest.mark.minutes
def test_several_commands_at_once_on_a_home_that_does_not_exist_all_succeed(tmp_path: Path):
    home = tmp_path / "home"
    commands = [start(home, *what) for what in (["models"], ["reconcile"], ["models", "--json"])]
    for process in commands:
        code, said = end(process)
        assert code == 0, said
    assert not list(home.rglob(".making-*"))


@pytest.mark.minutes
def test_a_command_that_is_killed_at_any_moment_leaves_a_home_that_the_next_one_uses(tmp_path: Path):
    """From its first folder on; the moments cover the making of the database on machines of any speed."""
    for number, after_s in enumerate(MOMENTS_S):
        home = tmp_path / str(number)
        process = start(home, "models")
        deadline = time.monotonic() + PATIENCE_S
        while not list(home.glob("mlflow/*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(after_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    again = [start(tmp_path / str(number), "models") for number in range(len(MOMENTS_S))]
    for process in again:
        code, said = end(process)
        assert code == 0, said


def half_made(home: Path, made: Path) -> Path:
    """What an earlier version left when it was killed in a migration: a table between two names, an old revision."""
    shutil.copytree(made, home)
    (home / "home.json").unlink()
    database = home / "mlflow" / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE _alembic_tmp_runs (x)")
        connection.execute("DROP TABLE logged_models")
        connection.execute("UPDATE alembic_version SET version_num = 'cc1f77228345'")
    (home / "mlflow" / "mlflow.db-journal").write_bytes(b"left by a process that was killed")
    return database


def test_a_half_made_database_is_made_anew(tmp_path: Path, made: Path):
    database = half_made(tmp_path / "home", made)
    tracker = Tracker(Settings(home=tmp_path / "home"))
    assert tracker.experiment("x")
    with closing(sqlite3.connect(database)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "logged_models" in names
    assert "_alembic_tmp_runs" not in names


def test_a_database_with_content_is_never_made_anew(tmp_path: Path, made: Path):
    home = tmp_path / "home"
    shutil.copytree(made, home)
    settings = Settings(home=home)
    Tracker(settings).experiment("mine")
    with closing(sqlite3.connect(settings.mlflow_database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    before = settings.mlflow_database.read_bytes()
    with pytest.raises(StoreError, match="a newer mlflow has written it"):
        Tracker(settings)
    assert settings.mlflow_database.read_bytes() == before


OLD_DATABASE = """
import sys
from alembic import command
from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine_with_retry
from mlflow.store.tracking.dbmodels.initial_models import Base
from tasks.databases import mlflow_migrations

engine, migrations = create_sqlalchemy_engine_with_retry(sys.argv[1]), mlflow_migrations()
Base.metadata.create_all(engine)
config = _get_alembic_config(sys.argv[1])
before = migrations.get_revision(migrations.get_current_head()).down_revision
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, before)
print(before)
"""


def test_a_database_of_an_earlier_mlflow_is_migrated_with_its_content_and_the_old_one_is_kept(tmp_path: Path):
    settings = at(tmp_path)
    settings.mlflow_database.parent.mkdir()
    made = subprocess.run(
        [sys.executable, "-c", OLD_DATABASE, settings.mlflow_uri], capture_output=True, text=True, check=True
    )
    before = made.stdout.split()[-1]
    with closing(sqlite3.connect(settings.mlflow_database)) as connection, connection:
        connection.execute(
            "INSERT INTO experiments (name, artifact_location, lifecycle_stage) VALUES ('mine', 'file:///x', 'active')"
        )
    assert Tracker(settings).client.get_experiment_by_name("mine").artifact_location == "file:///x"
    with closing(sqlite3.connect(settings.mlflow_database.with_name(f"mlflow.{before}.db"))) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (before,)


def test_a_damaged_database_is_refused_in_words_and_left_alone(tmp_path: Path):
    (tmp_path / "mlflow").mkdir()
    database = tmp_path / "mlflow" / "mlflow.db"
    database.write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="move it away to begin with an empty one"):
        ModelRegistry(Settings(home=tmp_path))
    assert database.read_bytes().startswith(b"no database")


def test_a_home_that_is_there_is_opened_at_once_and_not_written(made: Path):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.json")}
    began = time.perf_counter()
    for _ in range(10):
        open_home(Settings(home=made), with_prefect=True)
    assert time.perf_counter() - began < 1.0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.json")} == before


def test_both_databases_are_whole_and_in_one_file_each(made: Path):
    settings = Settings(home=made)
    for database in (mlflow_database(settings), prefect_database(settings)):
        with closing(sqlite3.connect(database.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        assert revision == database.migrations().get_current_head()
        assert json.loads((made / "home.json").read_text())["databases"][database.package]["revision"] == revision


def with_champion(home: Path, tmp_path: Path) -> Settings:
    """A registered model, as the pipeline registers one."""
    settings = at(home)
    tracker, registry = Tracker(settings), ModelRegistry(settings)
    run = tracker.client.create_run(tracker.experiment("m"))
    model = write_model(tmp_path / "model")
    question = [{"role": "user", "content": "hello?"}]
    version = registry.register("m", "k" * 64, run.info.run_id, model, question, {"qlora.model_digest": "d" * 64})
    tracker.tag(run.info.run_id, {"where": (settings.store / "report" / "report.html").as_uri()})
    tracker.client.set_terminated(run.info.run_id, "FINISHED")
    registry.client.set_registered_model_alias("m", "champion", str(version.number))
    return settings


def test_a_home_that_was_moved_finds_its_artifacts_and_makes_no_old_path_again(tmp_path: Path, made: Path):
    old, new = tmp_path / "old", tmp_path / "new place"
    shutil.copytree(made, old)
    with_champion(old, tmp_path)
    old.rename(new)
    settings = at(new)
    (said,) = home_check.examine(settings)
    assert (said.status, said.found) == ("warn", f"{new} was moved or copied from {old}")
    registry = ModelRegistry(settings)
    assert [check.status for check in home_check.examine(settings)] == ["ok"]
    version = registry.resolve("m@champion")
    assert (model_folder(registry, version) / "config.json").is_file()
    assert registry.example(version) == [{"role": "user", "content": "hello?"}]
    run = registry.client.get_run(version.run_id)
    assert run.data.tags["where"].startswith(new.as_uri())
    registry.client.log_text(version.run_id, "later", "later.txt")
    assert registry.client.get_experiment_by_name("m").artifact_location == Tracker(settings).settings.mlflow_artifacts
    assert not old.exists()
    assert str(old) not in (new / "mlflow" / "mlflow.db").read_bytes().decode(errors="replace")


def test_a_home_of_an_earlier_version_that_was_moved_is_recognized_by_its_experiments(tmp_path: Path, made: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(made, old)
    tracker = Tracker(at(old))
    run = tracker.client.create_run(tracker.experiment("m"))
    tracker.client.log_text(run.info.run_id, "hello", "hello.txt")
    (old / "home.json").unlink()
    old.rename(new)
    client = Tracker(at(new)).client
    assert Path(client.download_artifacts(run.info.run_id, "hello.txt")).read_text() == "hello"


def test_a_copy_of_a_home_leaves_the_original_alone(tmp_path: Path, made: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(made, one)
    tracker = Tracker(at(one))
    run = tracker.client.create_run(tracker.experiment("m"))
    shutil.copytree(one, two)
    assert Tracker(at(two)).client.get_run(run.info.run_id).info.artifact_uri.startswith(two.as_uri())
    assert Tracker(at(one)).client.get_run(run.info.run_id).info.artifact_uri.startswith(one.as_uri())


def test_a_home_that_is_in_use_at_its_old_place_is_not_adapted(tmp_path: Path, made: Path):
    """One folder at two places, as a mount makes it."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(made, old)
    tracker = Tracker(at(old))
    tracker.client.create_run(tracker.experiment("m"), tags={"qlora.owner": this_process()})
    shutil.copytree(old, new)
    with pytest.raises(StoreError, match=f"processes {os.getpid()} work in it"):
        Tracker(at(new))


def test_a_home_may_have_any_name(tmp_path: Path, made: Path):
    """`?` ends the path of a database's address, `#` and `%` mean something in the address of an artifact."""
    home = tmp_path / "a b?c#d%41é 中文"
    shutil.copytree(made, home)
    settings = with_champion(home, tmp_path)
    registry = ModelRegistry(settings)
    version = registry.resolve("m@champion")
    assert (model_folder(registry, version) / "config.json").is_file()
    assert registry.example(version)
    assert {path.name for path in tmp_path.iterdir()} == {home.name, "model"}
    assert settings.mlflow_database.is_file()


@pytest.mark.minutes
def test_both_databases_are_made_in_a_home_of_any_name_and_prefect_serves_from_it(tmp_path: Path):
    home = tmp_path / "a b?c#d%41é 中文"
    code, said = end(start(home, "reconcile"))
    assert code == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == [home.name]
    assert (home / "prefect" / "prefect.db").stat().st_size > 100_000
    with closing(sqlite3.connect((home / "prefect" / "prefect.db").as_uri(), uri=True)) as connection:
        assert connection.execute("SELECT count(*) FROM flow_run").fetchone() == (1,)
