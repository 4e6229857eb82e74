"""The retraining flow: download, prepare, train, merge, evaluate, register, promote."""

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run

from flows.shutdown import keeps_signals
from qlora_core.artifacts import Adapter, ModelSnapshot, PreparedDataset
from qlora_core.evaluation.evaluate import check_metrics
from qlora_core.recipe import Recipe
from tasks.cancelling import ends_when_cancelled
from tasks.download_task import download
from tasks.evaluate_task import evaluate
from tasks.match_task import match
from tasks.merge_task import merge
from tasks.moves import edits_by_hand
from tasks.orphans import end_orphans
from tasks.prepare_task import prepare
from tasks.promote_task import Outcome, promote
from tasks.register_task import register
from tasks.registry import ModelRegistry
from tasks.settings import Settings
from tasks.starving import ends_when_starved
from tasks.tracking import Retraining, Tracker
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
    with keeps_signals():
        if not force and settled(recipe, settings):
            for edit in edits_by_hand(ModelRegistry(settings), recipe.name):
                get_run_logger().warning(edit)
            return None
        tracker = Tracker(settings)
        end_orphans(tracker)
        return candidate(recipe, tracker)


def candidate(recipe: Recipe, tracker: Tracker, under: str | None = None) -> Outcome:
    """Make a candidate and take it to its gates, inside a flow.

    Args:
        recipe: what to make.
        tracker: where it is recorded.
        under: the MLflow run of the sweep that has chosen this recipe.

    Raises:
        RecipeError: its gates cannot be asked; known before anything is computed.
    """
    check_metrics(recipe.evaluation, recipe.promotion.gates)
    run = tracker.begin(recipe, str(flow_run.id), flow_run.ui_url, under=under)
    watched = ends_when_cancelled(str(flow_run.id), has_worker=bool(deployment.id))
    with ends_when_starved(), watched, tracker.final_status(run.parent_run_id):
        ModelRegistry(tracker.settings).announce(recipe.name, run.parent_run_id)
        base, dataset, adapter = trained(run)
        merged = merge(run, base, adapter, dataset).result()
        report = evaluate(run, base, dataset, adapter, merged).result()
        version = register(run, base, dataset, adapter, merged, report).result()
        return promote(run, report, version).result()


def trained(run: Retraining) -> tuple[ModelSnapshot, PreparedDataset, Adapter]:
    """Download, match, prepare and train; what is there is reused."""
    base = download(run).result()
    if base.quantization is not None:
        base = match(run, base).result()
    dataset = prepare(run, base).result()
    timeout_s = run.recipe.train.timeout_h * 3600
    return base, dataset, train.with_options(timeout_seconds=timeout_s)(run, base, dataset).result()
