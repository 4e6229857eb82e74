"""What the doctor says of a machine and of databases; servers are in tests/integration/test_team_commands.py."""

import sqlite3
from email.utils import formatdate
from pathlib import Path

import pytest

from tasks.doctor import check, databases, examine, machine
from tasks.settings import Settings

NOW_S = 1_800_000_000.0


@pytest.fixture(autouse=True)
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI", "PREFECT_API_URL", databases.PREFECT_DATABASE):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_without_servers_is_whole(tmp_path: Path):
    checks = list(examine(Settings(home=tmp_path)))
    assert {c.what for c in checks} >= {"versions", "GPU", "disk", "MLflow", "Prefect"}
    assert [c for c in checks if c.status == "fail"] == []


def test_a_check_that_breaks_is_a_failure_and_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "DISTRIBUTION", "nothing-of-this-name")
    checks = list(examine(Settings(home=tmp_path)))
    assert checks[0].what == "versions" and "could not be made" in checks[0].found
    assert "disk" in {c.what for c in checks}


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("fastapi>=900", ("fail", "is not >=900")),
        ("nothing-of-this-name>=1", ("fail", "nothing-of-this-name is missing")),
        ('boto3>=900; extra == "team"', ("fail", "is not >=900")),
    ],
)
def test_a_requirement_that_is_not_met_is_named(requirement: str, said: tuple[str, str]):
    (found,) = machine.unmet([requirement])
    assert found.status == said[0]
    assert said[1] in found.found
    assert found.do.startswith("pip install")


@pytest.mark.parametrize("requirement", ["fastapi", 'nothing-of-this-name; extra == "gptq"', 'x; python_version < "3"'])
def test_what_is_met_or_not_asked_for_is_silent(requirement: str):
    assert list(machine.unmet([requirement])) == []


@pytest.mark.parametrize(
    ("cuda", "built_for", "status"),
    [((13, 0), "13.0", "ok"), ((12, 9), "12.4", "ok"), ((12, 4), "13.0", "fail"), ((13, 0), None, "fail")],
)
def test_a_driver_must_speak_the_major_cuda_version_of_torch(cuda, built_for, status):
    assert machine.driver("580.65", cuda, built_for).status == status


@pytest.mark.parametrize(("free_gb", "status"), [(1.0, "fail"), (20.0, "warn"), (500.0, "ok")])
def test_room_for_a_small_model_is_needed_and_for_a_large_one_wished(free_gb, status):
    assert machine.room("disk", Path("/"), free_gb).status == status


@pytest.mark.parametrize(
    ("ahead_s", "status", "said"),
    [(0.9, "ok", ""), (-30, "warn", "30 s behind"), (600, "fail", "600 s ahead")],
)
def test_a_clock_that_is_off_is_measured(ahead_s, status, said):
    found = check.clock("clock", formatdate(NOW_S, usegmt=True), NOW_S + ahead_s)
    assert found.status == status
    assert said in found.found


@pytest.mark.parametrize(
    ("variable", "scheme", "do"),
    [
        ("MLFLOW_BACKEND_STORE_URI", "sqlite", "mlflow db upgrade"),
        (databases.PREFECT_DATABASE, "sqlite+aiosqlite", "prefect server database upgrade"),
    ],
)
def test_a_database_behind_its_program_is_named_with_the_command(tmp_path, monkeypatch, variable, scheme, do):
    path = tmp_path / "old.db"
    monkeypatch.setenv(variable, f"{scheme}:///{path}")
    assert list(databases.examine(Settings(home=tmp_path))) == []  # nobody has made it yet
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('a revision of last year')")
    (found,) = databases.examine(Settings(home=tmp_path))
    assert found.status == "fail"
    assert "is at a revision of last year, and what is installed here wants" in found.found
    assert f"{scheme}:///{path} " in found.found
    assert found.do.startswith(do)
