"""What importing costs, and what it must not pull in."""

import subprocess
import sys

import pytest

HEAVY = ("prefect", "mlflow", "torch", "transformers")


@pytest.mark.parametrize("module", ["qlora_core", "qlora_core.gates", "qlora_core.process", "flows.cli"])
def test_importing_pulls_in_nothing_heavy(module):
    program = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_a_flow_that_finds_nothing_to_do_needs_no_torch():
    program = "import sys, flows.scheduled; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_help_needs_nothing_heavy():
    program = (
        "import sys; from typer.testing import CliRunner; from flows.cli import app; "
        f"r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0 and 'run' in r.output; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_commands_about_versions_need_neither_torch_nor_prefect():
    program = f"import sys, flows.judging; print([m for m in {HEAVY} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['mlflow']"
