"""A home, a lock or a database of somebody else: a sentence, never a traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from qlora_core.errors import RegistryError, RegistryUnavailableError
from tasks.failures import explain

SOMEBODY = 65534
AS_SOMEBODY = """
import linecache, os, sys, traceback
import tasks.failures
from flows import cli

good, home, uid, *command = sys.argv[1:]

def run(home, *command):
    os.environ["QLORA_HOME"] = home
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    sys.argv = ["qlora", *command]
    cli.main()

try:
    run(good, *command)  # as root, so that everything is imported
except SystemExit:
    pass
os.setegid(int(uid))
os.seteuid(int(uid))
run(home, *command)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that everybody can reach, as far as pytest's own folders let them."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    return tmp_path


def asked_by_somebody(made: Path, home: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_", "PREFECT_"))}
    arguments = [sys.executable, "-c", AS_SOMEBODY, str(made), str(home), str(SOMEBODY), *command]
    return subprocess.run(arguments, env=kept, capture_output=True, text=True, timeout=400)


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    return done.stderr


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@needs_root
@pytest.mark.parametrize("what", ["a home that may not be looked into", "a place where none can be made", "a lock"])
def test_what_belongs_to_somebody_else_is_named_with_whose_it_is(made: Path, place: Path, what: str):
    home = place / "home"
    if what == "a lock":
        (home / "locks").mkdir(parents=True)
        (home / "locks" / "home.lock").touch(0o600)
        for path in (home, home / "locks"):
            os.chown(path, SOMEBODY, SOMEBODY)
    elif what.startswith("a home"):
        shutil.copytree(made, home)
        home.chmod(0o700)
    said = refused(asked_by_somebody(made, home, "models"))
    assert "which belongs to user 0; this is user 65534" in said
    assert "QLORA_HOME" in said


@needs_root
def test_a_home_of_somebody_else_can_be_read_and_is_named_when_it_must_be_written(made: Path, place: Path):
    home = place / "home"
    shutil.copytree(made, home)
    (home / "home.json").write_text((made / "home.json").read_text().replace(str(made), str(home)))
    assert "No registered models yet" in asked_by_somebody(made, home, "models").stdout
    (home / "home.json").unlink()
    said = refused(asked_by_somebody(made, home, "models"))
    assert "which belongs to user 0" in said


def test_sqlite_says_it_in_its_own_words_and_they_are_explained():
    for words in ("attempt to write a readonly database", "unable to open database file"):
        error = MlflowException(f"(sqlite3.OperationalError) {words}", error_code=TEMPORARILY_UNAVAILABLE)
        said = explain(error, "sqlite:////home/mlflow/mlflow.db")
        assert isinstance(said, RegistryError)
        assert not isinstance(said, RegistryUnavailableError)
        assert "may not be written by this user" in str(said)
