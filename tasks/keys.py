"""The fingerprint of every stage: what decides its output, and nothing else.

Downloads are identified by what was found at the source, later stages by the digests of what they read, so the whole
chain can be walked in the store without doing any work.
"""

from collections.abc import Sequence
from typing import Any

from qlora_core.artifacts import Adapter, DataSnapshot, MergedModel, ModelSnapshot, PreparedDataset
from qlora_core.data import prepare
from qlora_core.evaluation import evaluate
from qlora_core.hub import resolve
from qlora_core.hub.resolve import Resolved
from qlora_core.merging import export, merge
from qlora_core.merging.export import Kind
from qlora_core.recipe import Recipe, TrainRecipe
from qlora_core.store import fingerprint
from qlora_core.training import launch

SOURCES = {"rows", "evaluation_rows", "forgetting"}
"""Data keys that say where files are; what was found there is known by its digest."""
HOW_NOT_WHAT = {
    "activation_memory",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "loss_spike",
    "micro_batch_size",
    "nodes",
    "processes",
    "strategy",
    "timeout_h",
}
"""Training keys that change how the work is done, not what comes out of it."""


def model_key(model: Resolved) -> str:
    """Of a base model on disk."""
    code = getattr(model.source, "trust_remote_code", False)
    part = {"trust_remote_code": True} if code else {}
    return fingerprint("download-model", resolve.VERSION, part, {"revision": model.revision, "name": model.name})


def twin_key(quantized: ModelSnapshot, twin: ModelSnapshot) -> str:
    """Of the proof that one model is the other without quantization."""
    inputs = {"quantized": quantized.digest, "twin": twin.digest}
    return fingerprint("match", resolve.TWIN_VERSION, {}, inputs)


def data_key(rows: Sequence[Resolved], forgetting: Sequence[Resolved], evaluation: Sequence[Resolved]) -> str:
    """Of the raw data files."""
    inputs = {
        f"{role}.{number}.{file.name}": file.revision
        for role, files in (("rows", rows), ("forgetting", forgetting), ("evaluation", evaluation))
        for number, file in enumerate(files)
    }
    return fingerprint("download-data", resolve.VERSION, {}, inputs)


def prepare_key(recipe: Recipe, base: ModelSnapshot, raw: DataSnapshot) -> str:
    """Of the tokens and masks."""
    return fingerprint("prepare", prepare.VERSION, _preparing(recipe), {"base": base.digest, "raw": raw.digest})


def train_key(recipe: Recipe, base: ModelSnapshot, dataset: PreparedDataset) -> str:
    """Of the adapter."""
    part = _decisive(recipe.train)
    inputs = {"base": base.digest, "data": dataset.digest}
    return fingerprint("train", launch.VERSION, {**part, "seed": recipe.seed}, inputs)


def merge_key(recipe: Recipe, base: ModelSnapshot, adapter: Adapter) -> str:
    """Of the merged model."""
    part = {"merge": recipe.merge, "trained_on": recipe.train.quantization}
    inputs = {"base": base.merge_base.digest, "adapter": adapter.digest}
    return fingerprint("merge", merge.VERSION, part, inputs)


def export_key(kind: Kind, model_digest: str, dataset: PreparedDataset) -> str:
    """Of a merged model in 4 bits."""
    return fingerprint("export", export.VERSION, {"kind": kind}, {"model": model_digest, "data": dataset.digest})


def scores_key(recipe: Recipe, model_digest: str, dataset: PreparedDataset) -> str:
    """Of one model's scores; a model that was evaluated on these rows before is not evaluated again."""
    return fingerprint("scores", evaluate.VERSION, _scoring(recipe), {"model": model_digest, "data": dataset.digest})


def report_key(recipe: Recipe, candidate: str, champion: str | None, dataset: PreparedDataset) -> str:
    """Of the report that compares candidate, base and champion."""
    part = {**_judging(recipe), "approval": recipe.promotion.approval}
    inputs = {"candidate": candidate, "champion": champion or "", "data": dataset.digest}
    return fingerprint("report", evaluate.REPORT_VERSION, part, inputs)


def candidate_key(recipe: Recipe, merged: MergedModel, dataset: PreparedDataset) -> str:
    """Of a registered version: this model, judged on these rows by these rules."""
    part = _judging(recipe)
    return fingerprint("register", 1, part, {"model": merged.digest, "data": dataset.digest})


def measured_on(recipe: Recipe) -> dict[str, object]:
    """What decides by which rows, tokens and scores a model is measured: losses compare only where this is equal.

    It is what enters `prepare_key` and `scores_key`, with the sources that these know by their digests. Where
    evaluation has rows of its own, the rows of training are no part of it.
    """
    sources = recipe.data.model_dump(mode="json", include=SOURCES)
    preparing = _preparing(recipe)
    if recipe.data.evaluation_rows:
        del sources["rows"], preparing["shares"]
    return {"model": recipe.model, "sources": sources, "preparing": preparing, "scoring": _scoring(recipe)}


def _preparing(recipe: Recipe) -> dict[str, Any]:
    part = recipe.data.model_dump(mode="json", exclude=SOURCES)
    return part | {"shares": [share.model_dump() for share in recipe.data.shares], "seed": recipe.seed}


def _scoring(recipe: Recipe) -> dict[str, object]:
    return {"evaluation": evaluate.decisive(recipe.evaluation), "seed": recipe.seed}


def _decisive(train: TrainRecipe) -> dict[str, object]:
    return train.model_dump(mode="json", exclude=HOW_NOT_WHAT)


def _judging(recipe: Recipe) -> dict[str, object]:
    """What decides a verdict; who has to approve it afterwards does not."""
    gates = [gate.model_dump(mode="json") for gate in recipe.promotion.gates]
    return {
        "evaluation": evaluate.decisive(recipe.evaluation),
        "gates": gates,
        "seed": recipe.seed,
        "name": recipe.name,
    }
