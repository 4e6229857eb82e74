"""The retraining flow: download, prepare, train, merge, evaluate, register, promote."""

from prefect import flow
from prefect.runtime import flow_run

from qlora_core.recipe import Recipe
from tasks.download_task import download
from tasks.evaluate_task import evaluate
from tasks.match_task import match
from tasks.merge_task import merge
from tasks.orphans import end_orphans
from tasks.prepare_task import prepare
from tasks.promote_task import Outcome, promote
from tasks.register_task import register
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tasks.tracking import Tracker
from tasks.train_task import train
from tasks.unchanged import settled


@flow(name="retrain", flow_run_name="retrain {recipe.name}", persist_result=False)
def retrain(recipe: Recipe, force: bool = False) -> Outcome | None:
    """Make a new candidate from the recipe and promote it if it is better.

    Args:
        recipe: what to make.
        force: go through all stages even when this candidate was judged before.

    Returns:
        How it ended, or None when nothing has changed since this candidate was judged.
    """
    settings = Settings()
    if not force and settled(recipe, settings):
        return None
    tracker = Tracker(settings)
    end_orphans(tracker)
    run = tracker.begin(recipe, str(flow_run.id), flow_run.ui_url)
    with tracker.final_status(run.parent_run_id):
        ModelRegistry(settings).announce(recipe.name, run.parent_run_id)
        base = download(run).result()
        if base.quantization is not None:
            base = match(run, base).result()
        dataset = prepare(run, base).result()
        adapter = train.with_options(timeout_seconds=recipe.train.timeout_h * 3600)(run, base, dataset).result()
        merged = merge(run, base, adapter, dataset).result()
        report = evaluate(run, base, dataset, adapter, merged).result()
        version = register(run, base, dataset, adapter, merged, report).result()
        return promote(run, report, version).result()
