"""Flows for deployments: they take the path of a recipe instead of a recipe, and read it when they run."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.retrain import retrain
from qlora_core.cleanup import Freed, clean_up
from qlora_core.recipe import load_recipe
from qlora_core.store import Store
from tasks.fetching import earlier_copies
from tasks.keeping import roots
from tasks.moves import edits_by_hand
from tasks.orphans import end_orphans
from tasks.promote_task import Outcome
from tasks.publishing import DRIFTED, emit, publish_if_changed
from tasks.recheck_task import Recheck
from tasks.recheck_task import recheck as recheck_champion
from tasks.registry import CHAMPION, ModelRegistry
from tasks.settings import Settings
from tasks.tags import PARENT_RUN
from tasks.tracking import Tracker

Override = Annotated[str, Field(pattern=r"^[^=]+=")]
NotNegative = Annotated[float, Field(ge=0)]


@flow(name="retrain-recipe", flow_run_name="{recipe}", persist_result=False)
def retrain_recipe(recipe: Path, overrides: tuple[Override, ...] = (), force: bool = False) -> Outcome | None:
    """Read a recipe and retrain; ends at once when neither it nor its data has changed since a candidate was judged.

    Args:
        recipe: a file that the worker can read.
        overrides: dotted keys and values, such as `train.lora.rank=8`.
        force: judge the candidate again even if nothing has changed.
    """
    return retrain.fn(load_recipe(recipe, overrides), force)  # in this flow run, not in one below it


@flow(name="watch-data", flow_run_name="{recipe}", persist_result=False)
def watch_data(recipe: Path) -> str | None:
    """Publish a recipe's data if it has changed: a folder or file, an S3 prefix, or the revision of a hub.

    Args:
        recipe: a file that the worker can read.

    Returns:
        What identifies the data now, or None if it has not changed.
    """
    return publish_if_changed(load_recipe(recipe), Settings())


@flow(name="recheck-champion", flow_run_name="{recipe}", persist_result=False)
def recheck(recipe: Path, tolerance: NotNegative = 0.1) -> Recheck | None:
    """Score the champion on the recipe's data of today; a drop against its own scores retrains.

    Args:
        recipe: a file that the worker can read.
        tolerance: how much the loss may have grown, as a share of what it was when the champion was judged.

    Returns:
        How it does, or None if there is no champion yet.
    """
    settings, loaded = Settings(), load_recipe(recipe)
    registry = ModelRegistry(settings)
    for edit in edits_by_hand(registry, loaded.name):
        get_run_logger().warning(edit)
    champion = registry.at_alias(loaded.name, CHAMPION)
    if champion is None:
        get_run_logger().info("%s has no champion yet", loaded.name)
        return None
    tracker = Tracker(settings)
    end_orphans(tracker)
    retraining = tracker.reopen(champion.tags.get(PARENT_RUN, ""), str(flow_run.id))
    retraining = retraining or tracker.adopt(loaded, champion.number, str(flow_run.id))
    found = recheck_champion(retraining.model_copy(update={"recipe": loaded}), champion, tolerance)
    if found.drifted:
        get_run_logger().warning(found.sentence)
        emit(DRIFTED, loaded.name, found.model_dump(mode="json"))
    return found


@flow(name="clean-store", persist_result=False)
def clean_store(unused_days: NotNegative = 30) -> Freed:
    """Remove from the store of this worker what nobody has used for long and no alias or live run needs.

    Args:
        unused_days: how long ago the last use must be.
    """
    settings = Settings()
    freed = clean_up(Store(settings.store), unused_days, roots(settings), earlier_copies(settings))
    get_run_logger().info(freed.sentence)
    return freed
