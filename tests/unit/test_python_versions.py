"""Every Python that the classifiers name: what the oldest lacks and the newest has dropped is not used.

`make check` reads the code as the oldest Python does (`python_version` of mypy, `target-version` of ruff), the test
here as the newest. `make test PYTHON=python3.13` runs on another one, where it is installed.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.servers import CHECKOUT

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
CLASSIFIER = re.compile(r"^Programming Language :: Python :: (3\.\d+)$")
NAMED = [found[1] for line in PROJECT["project"]["classifiers"] if (found := CLASSIFIER.match(line))]
MISSING = re.compile(
    r'error: (?:Module (?:"\S+" )?has no attribute|.*\[syntax\]|.*named "(?P<module>[\w.]+)"  \[import-not-found\])'
)


def lacking(version: str, *what: str, cache: Path) -> list[str]:
    """What a Python of this version does not have, of its standard library and its syntax.

    Packages are not followed: they have their own classifiers.
    """
    quick = ["--config-file=", "--follow-imports=skip", "--python-version", version, "--cache-dir", str(cache)]
    command = [sys.executable, "-m", "mypy", *quick, *what]
    said = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=300).stdout
    assert "checked" in said, said
    found = [line for line in said.splitlines() if (at := MISSING.search(line)) and not optional(at["module"])]
    return [line.partition("error: ")[2] for line in found]


def optional(module: str | None) -> bool:
    """A package of an extra that need not be installed."""
    overrides = [name.removesuffix(".*") for part in PROJECT["tool"]["mypy"]["overrides"] for name in part["module"]]
    return module is not None and module.partition(".")[0] in overrides


def test_the_classifiers_begin_with_the_oldest_python_that_may_install_and_have_no_gap():
    assert PROJECT["project"]["requires-python"] == f">={NAMED[0]}"
    assert [f"3.{minor}" for minor in range(11, 11 + len(NAMED))] == NAMED
    assert NAMED[-1] == "3.13"


def test_style_and_types_are_checked_as_the_oldest_python_would_read_them():
    assert PROJECT["tool"]["mypy"]["python_version"] == NAMED[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{NAMED[0].replace('.', '')}"


def test_the_newest_python_has_all_that_is_used(tmp_path: Path):
    packages = [word for name in PROJECT["tool"]["mypy"]["packages"] for word in ("-p", name)]
    assert lacking(NAMED[-1], *packages, cache=tmp_path) == []


@pytest.mark.parametrize(
    ("version", "line", "said"),
    [
        ("3.13", "import cgi", '"cgi"'),
        ("3.13", "from locale import resetlocale", '"resetlocale"'),
        ("3.11", "from itertools import batched", '"batched"'),
        ("3.11", "type Pair = tuple[int, int]", "3.12"),
    ],
)
def test_what_a_python_lacks_is_noticed(tmp_path: Path, version: str, line: str, said: str):
    (tmp_path / "program.py").write_text(line + "\n")
    (found,) = lacking(version, str(tmp_path / "program.py"), cache=tmp_path)
    assert said in found
