"""Runs that were taken up by a process which was killed before their first step, on a real Prefect server."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import COMMAND_TIMEOUT_S
from tests.integration.conftest import free_port, shell, wait_until_healthy
from tests.servers import CHECKOUT

TAKE_UP = """
import json
from uuid import uuid4
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Pending
from flows.reconcile import reconcile

with get_client(sync_client=True) as client:
    flow = client.create_flow(reconcile)
    client.create_work_pool(WorkPoolCreate(name="cluster", type="kubernetes"))
    served = client.create_deployment(flow, "served", concurrency_limit=1)
    queued = client.create_deployment(flow, "queued", work_pool_name="cluster")
    first, second = (client.create_flow_run_from_deployment(served, name=name).id for name in ("first", "second"))
    cluster = client.create_flow_run_from_deployment(queued, name="cluster").id
    states = [client.set_flow_run_state(run, Pending()).state.name for run in (first, second, cluster)]
print(json.dumps({"first": str(first), "second": str(second), "cluster": str(cluster), "states": states}))
"""
LOOK = """
import json, os, subprocess, sys
from prefect.client.orchestration import get_client
from prefect.states import Pending
from tasks.orphans import end_pending

first, second, cluster = sys.argv[1:]
young = end_pending()
starting = subprocess.Popen(["sleep", "100"], env={**os.environ, "PREFECT__FLOW_RUN_ID": first})
alive = end_pending(0)
starting.kill()
starting.wait()
dead = end_pending(0)
with get_client(sync_client=True) as client:
    states = {name: client.read_flow_run(run).state.name for name, run in (("first", first), ("cluster", cluster))}
    again = [run.tags for run in client.read_flow_runs() if run.tags]
    next_one = client.set_flow_run_state(second, Pending()).state.name
print(json.dumps({"young": young, "alive": alive, "dead": dead, "states": states, "again": again, "next": next_one}))
"""


@contextmanager
def prefect_server(home: Path, port: int):
    """As `serve-flows` starts it; it is killed at the end, and its database stays."""
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/api/health")
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answer(program: str, environment: dict[str, str], *arguments: str) -> dict:
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        cwd=CHECKOUT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.minutes
def test_a_run_whose_process_was_never_born_is_ended_and_the_next_one_gets_its_slot(tmp_path):
    port = free_port()
    (tmp_path / "prefect").mkdir()
    environment = shell(f"http://127.0.0.1:{port}/api", tmp_path / "home", tmp_path)
    with prefect_server(tmp_path / "prefect", port):
        taken = answer(TAKE_UP, environment)
    assert taken["states"] == ["Pending", "AwaitingConcurrencySlot", "Pending"]
    with prefect_server(tmp_path / "prefect", port):  # it has forgotten who holds the slot
        found = answer(LOOK, environment, taken["first"], taken["second"], taken["cluster"])
    assert (found["young"], found["alive"]) == ([], [])
    (sentence,) = found["dead"]
    assert re.fullmatch(r"Prefect run first was pending for \d+ min without a process; it was ended", sentence)
    assert found["states"] == {"first": "Crashed", "cluster": "Pending"}
    assert found["again"] == [["restart 1"]]
    assert found["next"] == "Pending"
