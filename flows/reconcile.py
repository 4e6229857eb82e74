"""The flow that ends what crashed runs left open."""

from prefect import flow
from prefect.logging import get_run_logger

from tasks.orphans import end_orphans, end_pending
from tasks.registry import ModelRegistry
from tasks.repairing import repair_registry
from tasks.settings import Settings
from tasks.tracking import Tracker


@flow(name="reconcile", persist_result=False)
def reconcile() -> list[str]:
    """End orphaned runs, finish moves of aliases, expire approvals, repair tags, report edits made by hand.

    Returns:
        What was done and noticed, a sentence each.
    """
    settings = Settings()
    ended = [f"MLflow run {run_id} was ended: its process is gone" for run_id in end_orphans(Tracker(settings))]
    said = ended + end_pending() + repair_registry(ModelRegistry(settings))
    for sentence in said:
        get_run_logger().warning(sentence)
    return said
