"""The retraining flow for deployments: takes the path of a recipe instead of a recipe, and reads it when it runs."""

from pathlib import Path

from prefect import flow

from flows.retrain import retrain
from qlora_core.recipe import load_recipe
from tasks.promote_task import Outcome


@flow(name="retrain-recipe", flow_run_name="{recipe}", persist_result=False)
def retrain_recipe(recipe: Path, overrides: tuple[str, ...] = (), force: bool = False) -> Outcome | None:
    """Read a recipe and retrain.

    Args:
        recipe: a file that the worker can read.
        overrides: dotted keys and values, such as `train.lora.rank=8`.
        force: go through all stages even when this candidate was judged before.
    """
    return retrain(load_recipe(recipe, overrides), force)
