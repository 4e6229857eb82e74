"""End what crashed runs left open in MLflow and Prefect; safe beside live flows, which are known by their process."""

from contextlib import suppress
from uuid import UUID

import psutil
from mlflow.entities import Run
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from tasks.approval import expire_all
from tasks.moves import MOVE, edits_of, repair
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tasks.tracking import Tracker, owner_is_alive, runs_here

INIT_PID = 1
"""Who inherits a process whose parent has died."""
SERVER = "prefect.server.api.server:create_app"
AGAIN = ", again"
"""What is added to the name of a run that goes on where another one was killed."""
MOST_RESTARTS = 3
"""What has been killed so often will be killed again, out of memory perhaps: a person has to look."""


def end_orphans(tracker: Tracker) -> list[str]:
    """Set runs whose process is gone to KILLED, and their Prefect runs to Crashed; returns their MLflow ids.

    A process of another machine is gone if Prefect says that its flow is over. What a deployment had started is
    started again, and goes on from its last checkpoint. Call it where a Prefect server can be reached.
    """
    orphans = [run for run in tracker.open_runs() if _is_orphan(run)]
    for run in orphans:
        tracker.client.set_terminated(run.info.run_id, "KILLED")
    for flow_run_id in {_flow_run_id(run) for run in orphans} - {None}:
        _crash(str(flow_run_id))
    return [run.info.run_id for run in orphans]


def repair_registry(registry: ModelRegistry) -> list[str]:
    """Finish moves that were cut short, expire approvals that nobody gave, and name edits that were made by hand."""
    models = registry.models()
    repaired = [done for model in models if MOVE in model.tags and (done := repair(registry, model.name))]
    return repaired + expire_all(registry) + [edit for model in models for edit in edits_of(registry, model)]


def end_stray_servers(settings: Settings) -> None:
    """End embedded Prefect servers of this home whose flow was killed; they would hold its database open for ever."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("PREFECT_HOME") == str(settings.root / "prefect")
            if ours and process.ppid() == INIT_PID and SERVER in process.cmdline():
                process.terminate()


def _is_orphan(run: Run) -> bool:
    tags = run.data.tags
    if not owner_is_alive(tags.get("qlora.owner", "")):
        return True
    if runs_here(tags["qlora.owner"]):
        return False
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(tags["prefect.flow_run_id"])).state
        except ObjectNotFound:  # another Prefect server's
            return False
    return state is not None and state.is_final()


def _flow_run_id(run: Run) -> str | None:
    if run.data.tags.get("qlora.kind") not in ("retrain", "sweep", "trial"):
        return None
    flow_run_id: str | None = run.data.tags.get("prefect.flow_run_id")
    return flow_run_id


def _crash(flow_run_id: str) -> None:
    """End a flow run whose process is gone, unless Prefect has, and start again what a deployment had started."""
    with get_client(sync_client=True) as client:
        try:
            flow_run = client.read_flow_run(UUID(flow_run_id))
        except ObjectNotFound:
            return
        if flow_run.state is None or not flow_run.state.is_final():
            message = "its process is gone; a new run goes on where it stopped"
            client.set_flow_run_state(flow_run.id, Crashed(message=message), force=True)
        elif not flow_run.state.is_crashed():  # failed or cancelled: somebody has to look, or did not want it
            return
        if flow_run.deployment_id is not None and flow_run.name.count(AGAIN) < MOST_RESTARTS:
            client.create_flow_run_from_deployment(
                flow_run.deployment_id,
                parameters=flow_run.parameters,
                name=flow_run.name + AGAIN,
                idempotency_key=f"again {flow_run.id}",
            )
