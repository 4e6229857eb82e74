"""The flow that makes a registered model small: 4-bit exports of a version."""

from prefect import flow
from prefect.runtime import flow_run

from flows.shutdown import keeps_signals
from qlora_core.artifacts import ExportedModel
from qlora_core.merging.export import Kind
from tasks.export_task import export as export_version
from tasks.foreign import reopened
from tasks.orphans import end_orphans
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tasks.tracking import Tracker


@flow(name="export", flow_run_name="export {model} as {kind}", persist_result=False)
def export(model: str, kind: Kind) -> ExportedModel:
    """Quantize the version behind an alias, in a nested run of the retraining that made it.

    Args:
        model: `MODEL@ALIAS`; the alias is `champion` when left out.
        kind: `nf4`, which bitsandbytes loads, or `gptq-int4`.
    """
    settings = Settings()
    tracker = Tracker(settings)
    registry = ModelRegistry(settings)
    version = registry.resolve(model)
    end_orphans(tracker)
    retraining = reopened(registry, tracker, version, str(flow_run.id))
    with keeps_signals():
        return export_version(retraining, version, kind).result()
