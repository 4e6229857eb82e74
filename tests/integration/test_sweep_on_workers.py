"""Trials on a deployment's workers, on a real Prefect server."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.commands import COMMAND_TIMEOUT_S

PROGRAM = """
import sys
from prefect import flow
from prefect.client.orchestration import get_client
from qlora_core.recipe import Recipe
from tasks.sweeping import Attempt, run_elsewhere
from tasks.tracking import Retraining
from flows.sweep import trial

RECIPE = Recipe.model_validate(
    {"name": "r", "model": {"source": "local", "path": "m"}, "data": {"rows": [{"source": "local", "path": "d"}]}}
)

@flow
def part_of_a_sweep():
    attempts = [Attempt(number=number, values={}, recipe=RECIPE) for number in (1, 2, 3)]
    sweep = Retraining(recipe=RECIPE, experiment_id="0", parent_run_id="sweep", flow_run_id="flow")
    run_elsewhere("trial/two-at-most", attempts, None, sweep)

with get_client(sync_client=True) as client:
    schema = {"type": "object", "properties": {"number": {"type": "integer", "maximum": 2}}}
    client.create_deployment(
        client.create_flow(trial), "two-at-most", parameter_openapi_schema=schema, enforce_parameter_schema=True
    )
part_of_a_sweep()
"""


@pytest.mark.minutes
def test_a_trial_that_cannot_start_ends_those_that_have_started(prefect_api, environment, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    assert ran.returncode != 0
    assert "3 is greater than the maximum of 2" in ran.stdout + ran.stderr
    asked = {"flows": {"name": {"any_": ["trial"]}}}
    runs = httpx.post(f"{prefect_api}/flow_runs/filter", json=asked, timeout=60).json()
    assert sorted(run["parameters"]["number"] for run in runs) == [1, 2]
    assert {run["state_type"] for run in runs} == {"CANCELLED"}
