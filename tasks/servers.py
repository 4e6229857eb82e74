"""What the team's Prefect server has."""

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from qlora_core.errors import QloraError
from tasks.settings import Settings


def require_pool(pool: str, settings: Settings) -> None:
    """Ask the server for a work pool.

    Raises:
        QloraError: no server is set, or it has no such pool.
    """
    if settings.embedded_prefect:
        raise QloraError(
            "PREFECT_API_URL is not set; deployments need a Prefect server that stays. Set it, or run schedules "
            "on this machine with `qlora serve-flows`"
        )
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            known = ", ".join(found.name for found in client.read_work_pools()) or "none"
            raise QloraError(
                f"the Prefect server has no work pool {pool}; it has {known}. Make it with "
                f"`prefect work-pool create {pool} --type process`"
            ) from None
