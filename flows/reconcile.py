"""The flow that ends what crashed runs left open."""

from prefect import flow

from tasks.orphans import end_orphans
from tasks.settings import Settings
from tasks.tracking import Tracker


@flow(name="reconcile", persist_result=False)
def reconcile() -> list[str]:
    """End orphaned MLflow and Prefect runs; returns the MLflow ids of those that were ended."""
    return end_orphans(Tracker(Settings()))
