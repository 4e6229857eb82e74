"""Train: a QLoRA adapter, in child processes."""

import json

from prefect import State, task

from qlora_core.artifacts import Adapter, ModelSnapshot, PreparedDataset
from qlora_core.training import launch
from tasks.keys import train_key
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining


@task(name="train", task_run_name="train {retraining.recipe.name}", **RETRYING)
def train(retraining: Retraining, base: ModelSnapshot, dataset: PreparedDataset) -> State[Adapter]:
    """Train the adapter, or go on from the newest checkpoint of an interrupted attempt."""
    recipe = retraining.recipe
    with Stage("train", retraining) as stage:
        return stage.run(
            train_key(recipe, base, dataset),
            Adapter,
            lambda into, report: launch.train(recipe.train, recipe.seed, base, dataset, into, report),
            params={**recipe.train.model_dump(mode="json"), "seed": recipe.seed},
            describe=lambda adapter: _describe(adapter, dataset),
            line=_line,
            keep=launch.KEEP,
        )


def _describe(adapter: Adapter, dataset: PreparedDataset) -> Described:
    return Described(
        metrics={
            "final_train_loss": adapter.train_loss,
            "final_evaluation_loss": adapter.evaluation_loss,
            "trainable_parameters": adapter.trainable_parameters,
            "steps": adapter.steps,
        },
        tags={
            "qlora.digest": adapter.digest,
            "qlora.base_digest": adapter.base_digest,
            "qlora.data_digest": adapter.data_digest,
        },
        artifacts=((adapter.path, "adapter"),),
        dataset=("prepared rows", dataset.digest, dataset.path.as_uri()),
    )


def _line(adapter: Adapter) -> str:
    first = json.loads((adapter.path / "history.jsonl").read_text().splitlines()[0])["loss"]
    return (
        f"{adapter.steps} steps, rank {adapter.rank}, {adapter.trainable_parameters / 1e6:.1f}M trained parameters, "
        f"loss {first:.3f} to {adapter.train_loss:.3f}"
    )
