"""Register: one version per judged model, with its whole lineage."""

import json

from prefect import State, task
from prefect.states import Completed

from qlora_core.artifacts import Adapter, EvaluationReport, MergedModel, ModelSnapshot, PreparedDataset
from qlora_core.merging.merge import MODEL, scored_folder
from qlora_core.modeling.rows import example_messages
from tasks.approval import NOBODY
from tasks.keys import candidate_key
from tasks.registry import ModelRegistry, Version
from tasks.settings import Settings, without_secrets
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
        ended_well = stage.tracker.made_by(retraining, "register", key) is not None
        if known is not None and ended_well:  # judged again, perhaps against another champion
            registry.tag(known, _judged(stage.settings, retraining, report))
            known = registry.version(recipe.name, known.number)
            stage.display.done(f"version {known.number} of {recipe.name}", reused=True)
            return Completed(name="Reused", data=known)
        with stage.recorded(key) as run, scored_folder(merged.path / MODEL, report) as folder:
            run.params({"name": recipe.name})
            version = registry.register(
                recipe.name,
                key,
                run.run_id,
                folder,
                example_messages(dataset.path),
                {**_lineage(base, dataset, adapter, merged), **_judged(stage.settings, retraining, report)},
            )
            run.describe(Described(tags={"qlora.version": str(version.number), "qlora.digest": merged.digest}))
        stage.display.done(f"version {version.number} of {recipe.name}")
        return Completed(name="Made", data=version)


def _lineage(base: ModelSnapshot, dataset: PreparedDataset, adapter: Adapter, merged: MergedModel) -> dict[str, str]:
    """What the version is made from."""
    return {
        "qlora.base": base.source,
        "qlora.base_digest": base.digest,
        "qlora.data_digest": dataset.digest,
        "qlora.adapter_digest": adapter.digest,
        "qlora.model_digest": merged.digest,
    }


def _judged(settings: Settings, retraining: Retraining, report: EvaluationReport) -> dict[str, str]:
    """What it was judged by."""
    place = f"#/experiments/{retraining.experiment_id}/runs/{retraining.parent_run_id}/artifacts/report.html"
    served = settings.mlflow_uri.startswith("http")
    return {
        "qlora.report": f"{without_secrets(settings.mlflow_uri).rstrip('/')}/{place}"
        if served
        else report.path.as_uri() + "/report.html",
        "qlora.report_digest": report.digest,
        "qlora.report_key": report.fingerprint,
        "qlora.compared_with": report.champion_digest or NOBODY,
        "qlora.parent_run": retraining.parent_run_id,
        "qlora.scores": json.dumps(report.candidate),
        "qlora.other_scores": json.dumps({"base": report.base, "champion": report.champion or {}}),
    }
