"""What importing costs, and what it must not pull in."""

import os
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


def test_a_flow_that_a_worker_starts_sends_no_telemetry_of_mlflow():
    """It would change the environment in a thread, and a request that is just reading all variables would fail."""
    program = (
        "import os, flows.scheduled; from mlflow.telemetry.client import get_telemetry_client; "
        "print(get_telemetry_client(), [name for name in os.environ if name.startswith('_MLFLOW_')])"
    )
    variables = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "_MLFLOW_TELEMETRY_SESSION_ID": "inherited"}
    variables |= {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
    assert printed.strip() == "None []"
