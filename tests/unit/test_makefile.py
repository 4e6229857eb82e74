"""Which environment `make` uses: `.venv`, or one of its own for another Python that is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import CHECKOUT

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def make(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """What `make test` would do in a folder."""
    command = ["make", "--file", str(CHECKOUT / "Makefile"), "--dry-run", "test", *arguments]
    ours = ("MAKE", "MFLAGS", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment | variables, timeout=60)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    return tmp_path


def environment_of(checkout: Path, version: str) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")


def test_another_python_than_that_of_the_environment_gets_its_own(checkout: Path):
    environment_of(checkout, "3.9.2")
    said = make(checkout, f"PYTHON={sys.executable}").stdout
    assert f"{sys.executable} -m venv .venv-{HERE}\n" in said
    assert f".venv-{HERE}/bin/python -m pytest" in said
    assert f".venv-{HERE}/bin/python -m pytest" in make(checkout, PYTHON=sys.executable).stdout


@pytest.mark.parametrize("named", [(), (f"PYTHON={sys.executable}",)], ids=["none named", "the same named"])
def test_else_there_is_one_environment(checkout: Path, named: tuple[str, ...]):
    assert ".venv/bin/python -m pytest" in make(checkout, *named).stdout, "before there is one"
    environment_of(checkout, f"{HERE}.99")
    assert "\n.venv/bin/python -m pytest" in make(checkout, *named).stdout


def test_a_python_that_is_not_there_is_refused_in_words(checkout: Path):
    refused = make(checkout, "PYTHON=python3.99")
    assert refused.returncode == 2
    assert "PYTHON is python3.99, which does not run; name a Python 3.11 or newer" in refused.stderr
