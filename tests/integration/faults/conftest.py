"""The servers, once a test process; and the table that the matrix ends with."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.faults.faults import DISK_BYTES
from tests.integration.faults.table import table
from tests.integration.faults.world import SIGN_IN, World, world

RESULTS = "QLORA_FAULTS_RESULTS"
"""Environment variable: a folder that gets what every cell came to, and the table."""


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.fixture(autouse=True)
def signed_in(everything: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process asks MLflow itself, as a member."""
    for name in SIGN_IN:
        monkeypatch.setenv(name, everything.team.environment[name])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    folder = os.environ.get(RESULTS)
    if not folder or os.environ.get("PYTEST_XDIST_WORKER") or not Path(folder).is_dir():
        return
    cells = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    text = table(cells)
    (Path(folder) / "table.md").write_text(text)
    terminalreporter.write_line(text)
