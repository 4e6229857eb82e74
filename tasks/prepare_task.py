"""Prepare: from raw files to tokens and loss masks."""

from prefect import State, task

from qlora_core.artifacts import DataSnapshot, ModelSnapshot, PreparedDataset
from qlora_core.data.prepare import prepare as prepare_rows
from tasks.keys import prepare_key
from tasks.sources import obtain_raw
from tasks.stage import RETRYING, Stage
from tasks.tracking import Described, Retraining


@task(name="prepare", task_run_name="prepare {retraining.recipe.name}", timeout_seconds=6 * 3600, **RETRYING)
def prepare(retraining: Retraining, base: ModelSnapshot) -> State[PreparedDataset]:
    """Fetch the raw files and turn their rows into tokens that carry loss or not."""
    recipe = retraining.recipe
    with Stage("prepare", retraining) as stage:
        raw = obtain_raw(recipe, stage.settings, stage.report)
        earlier = stage.store.newest(PreparedDataset, "prepare")
        return stage.run(
            prepare_key(recipe, base, raw),
            PreparedDataset,
            lambda into, report: prepare_rows(recipe.data, recipe.seed, base, raw, into, report, earlier),
            params=recipe.data,
            describe=lambda dataset: _describe(dataset, raw),
            line=_line,
        )


def _describe(dataset: PreparedDataset, raw: DataSnapshot) -> Described:
    counts = {
        "train_rows": dataset.train_rows,
        "evaluation_rows": dataset.evaluation_rows,
        "train_tokens": dataset.train_tokens,
        "trained_tokens": dataset.trained_tokens,
        "reused_rows": dataset.reused_rows,
        "packing_efficiency": dataset.packing_efficiency,
        **{f"dropped.{reason}": rows for reason, rows in dataset.dropped.items()},
        **{f"noticed.{reason}": rows for reason, rows in dataset.noticed.items()},
    }
    return Described(
        metrics=counts,
        tags={"qlora.digest": dataset.digest, "qlora.template": dataset.template_digest},
        artifacts=tuple((dataset.path / name, "") for name in ("summary.json", "preview.json", "page.html")),
        dataset=(raw.rows[0].name, dataset.digest, raw.rows[0].source),
    )


def _line(dataset: PreparedDataset) -> str:
    dropped = sum(dataset.dropped.values())
    return (
        f"{dataset.train_rows:,} training and {dataset.evaluation_rows:,} evaluation rows, "
        f"{dataset.trained_tokens:,} of {dataset.train_tokens:,} tokens trained, {dropped:,} rows dropped"
    )
