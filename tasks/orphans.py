"""End what crashed runs left open in MLflow and Prefect; safe beside live flows, which are known by their process."""

import re
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from uuid import UUID

import psutil
from mlflow.entities import Run
from prefect import State, tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed

from tasks.processes import is_process, owner_is_alive, runs_here, this_process
from tasks.settings import Settings
from tasks.tracking import Tracker

GONE = "its process is gone; a new run goes on where it stopped"
AWAY = "it ended well while this server was away"
PROCESS = "process "
"""Begins the tag that names the process of a flow run."""
INIT_PID = 1
"""Who inherits a process whose parent has died."""
SERVER = "prefect.server.api.server:create_app"
WHOLE_FLOWS = ("retrain", "sweep", "trial")
"""Kinds of MLflow runs that stand for a Prefect flow run."""
STARTED_FOR = "PREFECT__FLOW_RUN_ID"
"""Prefect's environment variable in the process of a flow run."""
PENDING_S = 600.0
"""A process begins its run within a minute; whoever is slower than this has been killed."""
AGAIN = re.compile(r"restart (\d+)")
"""Tag of a run that goes on where another one was killed. Its name would not do: flows name their runs themselves."""
MOST_RESTARTS = 3
"""What has been killed so often will be killed again, out of memory perhaps: a person has to look."""


def end_orphans(tracker: Tracker) -> list[str]:
    """Set runs whose process is gone to KILLED, and their Prefect runs to Crashed; returns their MLflow ids.

    A process that cannot be seen from here is gone if Prefect says that its flow is over. What a deployment had started
    is started again, and goes on from its last checkpoint. Call it where a Prefect server can be reached.
    """
    orphans = [run for run in tracker.open_runs() if _is_orphan(run) and _is_orphan_still(tracker, run)]
    for run in orphans:
        tracker.client.set_terminated(run.info.run_id, "KILLED")
    for flow_run_id in {_flow_run_id(run) for run in orphans if run.data.tags.get("qlora.kind") in WHOLE_FLOWS}:
        if flow_run_id is not None:
            _crash(flow_run_id)
    _end_stale_flow_runs(tracker)
    return [run.info.run_id for run in orphans]


def end_pending(older_than_s: float = PENDING_S) -> list[str]:
    """End runs that wait for a process which nobody starts any more, and start them again; returns a sentence each.

    A run is pending between being taken up and its first step. If whoever took it up is killed then, it stays so for
    ever, and where its deployment runs one at a time, no other one begins. Pools other than of processes have queues
    of their own, in which a run may well wait for hours.

    Args:
        older_than_s: seconds that a run may be pending; 0 where nobody else can have taken it up.
    """
    started = _flow_runs_of_processes()
    said = []
    with get_client(sync_client=True) as client:
        is_pending = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING]))
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=is_pending)):
            if run.deployment_id is None or run.state is None or str(run.id) in started:
                continue
            pending_s = (datetime.now(UTC) - run.state.timestamp).total_seconds()
            if pending_s < older_than_s or not _is_run_by_process(client, run):
                continue
            _crash(run.id)
            said.append(
                f"Prefect run {run.name} was pending for {pending_s / 60:.0f} min without a process; it was ended"
            )
    return said


def _is_run_by_process(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether its process is started by `serve-flows` or by a worker of processes."""
    return run.work_pool_name is None or client.read_work_pool(run.work_pool_name).type == "process"


def _flow_runs_of_processes() -> set[str]:
    """Flow runs whose process has been started on this machine; the first thing it does takes many seconds."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found.add(process.environ().get(STARTED_FOR, ""))
    return found


def born_here() -> AbstractContextManager[object]:
    """Flow runs begun inside bear a tag with the process, where no worker knows it.

    A tag is there from birth: whatever a run signs itself leaves a moment before it in which it can be killed.
    """
    return tags(f"{PROCESS}{this_process()}")


def end_stray_servers(settings: Settings) -> None:
    """End embedded Prefect servers of this home whose flow was killed; they would hold its database open for ever."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("PREFECT_HOME") == str(settings.root / "prefect")
            if ours and process.ppid() == INIT_PID and SERVER in process.cmdline():
                process.terminate()


def _is_orphan(run: Run) -> bool:
    owner = run.data.tags.get("qlora.owner", "")
    if not owner:
        return True
    if is_process(owner) and runs_here(owner):
        return not owner_is_alive(owner)
    flow_run_id = _flow_run_id(run)
    if flow_run_id is None:  # somebody has edited the run, and nothing tells whether it still works
        return False
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(flow_run_id).state
        except ObjectNotFound:  # another Prefect server's
            return False
    return state is not None and state.is_final()


def _is_orphan_still(tracker: Tracker, run: Run) -> bool:
    """Looked at again: a list of many runs is old by the time its last one comes up, and somebody may go on with it."""
    now = tracker.client.get_run(run.info.run_id)
    return now.info.status == "RUNNING" and _is_orphan(now)


def _flow_run_id(run: Run) -> UUID | None:
    """The Prefect run that works on an MLflow run, as far as its tag says."""
    try:
        return UUID(run.data.tags.get("prefect.flow_run_id", ""))
    except ValueError:
        return None


def _end_stale_flow_runs(tracker: Tracker) -> None:
    """What Prefect still believes to run, although its process is gone: killed, or it ended while Prefect was away."""
    open_types = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    is_open = FlowRunFilterState(type=FlowRunFilterStateType(any_=open_types))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=is_open)):
            owner = _process_of(run)
            if runs_here(owner) and not owner_is_alive(owner):
                ended_well = tracker.status_of_flow(str(run.id)) == "FINISHED"
                state: State = Completed(message=AWAY) if ended_well else Crashed(message=GONE)
                client.set_flow_run_state(run.id, state, force=True)


def _process_of(run: FlowRun) -> str:
    """The process that has begun a flow run; empty when that was no command of ours."""
    if run.deployment_id is not None:  # asked for here, perhaps, but run by a worker
        return ""
    owners = (tag.removeprefix(PROCESS) for tag in run.tags if tag.startswith(PROCESS))
    return next((owner for owner in owners if is_process(owner)), "")


def _crash(flow_run_id: UUID) -> None:
    """End a flow run whose process is gone, unless Prefect has, and start again what a deployment had started."""
    with get_client(sync_client=True) as client:
        try:
            flow_run = client.read_flow_run(flow_run_id)
        except ObjectNotFound:
            return
        if flow_run.state is None or not flow_run.state.is_final():
            client.set_flow_run_state(flow_run.id, Crashed(message=GONE), force=True)
        elif not flow_run.state.is_crashed():  # failed or cancelled: somebody has to look, or did not want it
            return
        restarts = max((int(found[1]) for found in map(AGAIN.fullmatch, flow_run.tags) if found), default=0)
        if flow_run.deployment_id is not None and restarts < MOST_RESTARTS:
            client.create_flow_run_from_deployment(
                flow_run.deployment_id,
                parameters=flow_run.parameters,
                tags=[*(tag for tag in flow_run.tags if not AGAIN.fullmatch(tag)), f"restart {restarts + 1}"],
                idempotency_key=f"again {flow_run.id}",
            )
