"""The team's Prefect server: does it answer, as what, to whom, and is there a worker for what is deployed."""

import time
from collections import defaultdict
from collections.abc import Iterator

import httpx
import prefect
from packaging.version import Version
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import WorkerStatus, WorkPool
from prefect.client.schemas.responses import DeploymentResponse

from tasks.doctor.check import Check, clock, failed, ok, warned
from tasks.failures import explain_prefect
from tasks.settings import without_secrets

OURS = "flows."
"""How the entry points of this package's flows begin."""
PROCESS = "process"
PAGE = 200


def examine() -> Iterator[Check]:
    """Reachable, versions, clock, credentials, database, pools, workers; ends at the first that all others need."""
    with get_client(sync_client=True) as client:
        where = without_secrets(str(client.api_url))
        try:
            answer = client.request("GET", "/admin/version")
        except Exception as error:
            yield _refused(where, error)
            return
        yield _version(where, str(answer.json()))
        if "Date" in answer.headers:
            yield clock("Prefect clock", answer.headers["Date"], time.time())
        try:
            pools, deployments = _all(client)
        except httpx.HTTPStatusError as error:
            do = "look at the server's log; after an update run `prefect server database upgrade`"
            yield failed("Prefect database", f"the server answers {error.response.status_code}", do)
            return
        yield from _pools(client, pools, deployments)


def _refused(where: str, error: Exception) -> Check:
    do = "start it, or correct PREFECT_API_URL, which ends with /api; for a certificate of one's own, set "
    do += "PREFECT_API_SSL_CERT_FILE to a file of root certificates"
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
        do = "set PREFECT_API_AUTH_STRING to user:password, as PREFECT_SERVER_API_AUTH_STRING of the server has it"
    said = explain_prefect(error) or f"{where}: {type(error).__name__} {error}"
    return failed("Prefect", " ".join(str(said).split())[:300], do)


def _version(where: str, theirs: str) -> Check:
    ours = prefect.__version__
    if Version(theirs).release[:2] == Version(ours).release[:2]:
        return ok("Prefect", f"{where} answers, version {theirs}")
    return warned("Prefect", f"{where} has version {theirs}, and {ours} is here", "run the same minor version on both")


def _all(client: SyncPrefectClient) -> tuple[dict[str, WorkPool], list[DeploymentResponse]]:
    pools = {pool.name: pool for pool in client.read_work_pools(limit=PAGE)}
    deployments: list[DeploymentResponse] = []
    while len(page := client.read_deployments(limit=PAGE, offset=len(deployments))) == PAGE:
        deployments += page
    deployments += page
    return pools, [found for found in deployments if (found.entrypoint or "").startswith(OURS)]


def _pools(
    client: SyncPrefectClient, pools: dict[str, WorkPool], deployments: list[DeploymentResponse]
) -> Iterator[Check]:
    """A line for each pool that something of ours is deployed to; then what is served without one."""
    if not deployments:
        do = "`qlora deploy RECIPE --cron ...`, or `prefect deploy --all --prefect-file deployments/prefect.yaml`"
        yield warned("deployments", f"none; pools: {', '.join(pools) or 'none'}", do)
        return
    by_pool: defaultdict[str | None, list[str]] = defaultdict(list)
    for deployment in deployments:
        by_pool[deployment.work_pool_name].append(deployment.name)
    served = by_pool.pop(None, [])
    for name, wanted in sorted((str(pool), names) for pool, names in by_pool.items()):
        yield _pool(client, name, pools.get(name), wanted)
    if served:
        yield ok("deployments", f"{', '.join(sorted(served))} run where `qlora serve-flows` runs")


def _pool(client: SyncPrefectClient, name: str, pool: WorkPool | None, wanted: list[str]) -> Check:
    what, who = f"pool {name}", f"{len(wanted)} deployments"
    if pool is None:
        return failed(what, f"is gone; {who} name it", f"prefect work-pool create {name} --type {PROCESS}")
    if pool.is_paused:
        return warned(what, f"is paused; {who} wait", f"prefect work-pool resume {name}")
    workers = [w.name for w in client.read_workers_for_work_pool(name) if w.status == WorkerStatus.ONLINE]
    if not workers:
        do = f"prefect worker start --pool {name} --limit 1   (one a GPU)"
        return failed(what, f"has no worker online; {who} would wait for ever", do)
    late = _late(client, name)
    if late:
        do = "start another worker, or wait: a worker takes up a run when one of its --limit ends"
        return warned(what, f"{late} runs are late; workers online: {', '.join(workers)}", do)
    return ok(what, f"{who}, workers online: {', '.join(workers)}")


def _late(client: SyncPrefectClient, pool: str) -> int:
    body = {
        "work_pools": {"name": {"any_": [pool]}},
        "flow_runs": {"state": {"name": {"any_": ["Late"]}}},
    }
    return int(client.request("POST", "/flow_runs/count", json=body).json())
