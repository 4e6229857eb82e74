"""Register: one version per judged model, with its whole lineage."""

import json

from prefect import State, task
from prefect.states import Completed

from qlora_core.artifacts import Adapter, EvaluationReport, MergedModel, ModelSnapshot, PreparedDataset
from qlora_core.modeling.rows import example_messages
from tasks.keys import candidate_key
from tasks.registry import ModelRegistry, Version
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining


@task(name="register", task_run_name="register {retraining.recipe.name}", timeout_seconds=3600, **RETRYING)
def register(
    retraining: Retraining,
    base: ModelSnapshot,
    dataset: PreparedDataset,
    adapter: Adapter,
    merged: MergedModel,
    report: EvaluationReport,
) -> State[Version]:
    """Log the merged model and register it, unless this very model was registered before."""
    recipe = retraining.recipe
    key = candidate_key(recipe, merged, dataset)
    with Stage("register", retraining) as stage:
        registry = ModelRegistry(stage.settings)
        known = registry.find(recipe.name, key)
        if known is not None:
            stage.display.done(f"version {known.number} of {recipe.name}", reused=True)
            return Completed(name="Reused", data=known)
        with stage.recorded(key) as run:
            run.params({"name": recipe.name})
            version = registry.register(
                recipe.name,
                key,
                run.run_id,
                merged.path / "model",
                example_messages(dataset.path),
                _lineage(retraining, base, dataset, adapter, merged, report),
            )
            run.describe(Described(tags={"qlora.version": str(version.number), "qlora.digest": merged.digest}))
        stage.display.done(f"version {version.number} of {recipe.name}")
        return Completed(name="Made", data=version)


def _lineage(
    retraining: Retraining,
    base: ModelSnapshot,
    dataset: PreparedDataset,
    adapter: Adapter,
    merged: MergedModel,
    report: EvaluationReport,
) -> dict[str, str]:
    return {
        "qlora.base": base.source,
        "qlora.base_digest": base.digest,
        "qlora.data_digest": dataset.digest,
        "qlora.adapter_digest": adapter.digest,
        "qlora.model_digest": merged.digest,
        "qlora.report_digest": report.digest,
        "qlora.report_key": report.fingerprint,
        "qlora.parent_run": retraining.parent_run_id,
        "qlora.scores": json.dumps(report.candidate),
    }
