"""The built wheel in an environment of its own: nothing of the checkout is on its path."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An environment with the wheel; its dependencies are those that are installed here already."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("qlora_flows-*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_the_installed_command_answers_and_all_three_packages_come_from_the_wheel(python, tmp_path):
    shown = subprocess.run(
        [python.parent / "qlora", "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    ).stdout
    assert "Retrain: download" in shown
    program = "import flows, tasks, qlora_core; print(*(m.__file__ for m in (flows, tasks, qlora_core)), sep='\\n')"
    places = subprocess.run([python, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert all(str(python.parent.parent) in place for place in places.splitlines()), places


def test_the_report_template_is_in_the_wheel(python, tmp_path):
    template = "files('qlora_core.evaluation') / 'templates' / 'report.html.j2'"
    program = f"from importlib.resources import files; print({template})"
    place = subprocess.run([python, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert Path(place.strip()).is_file()
