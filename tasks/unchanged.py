"""Whether a retraining would change anything, found by walking fingerprints through the store, without any work."""

from typing import NamedTuple

from mlflow.exceptions import MlflowException

from qlora_core.artifacts import (
    Adapter,
    DataSnapshot,
    MergedModel,
    ModelSnapshot,
    PreparedDataset,
    Twin,
    TwinProof,
)
from qlora_core.recipe import Recipe
from qlora_core.store import Store
from tasks import keys
from tasks.registry import ModelRegistry, Version
from tasks.settings import Settings
from tasks.sources import resolve_base, resolve_data, resolve_twin
from tasks.tags import OPEN, PARENT_RUN


def settled(recipe: Recipe, settings: Settings) -> Version | None:
    """The version that this recipe and its data have made and that was judged, or None if there is work to do.

    A candidate that its gates refused stays refused until the data or the recipe changes.
    """
    made = made_so_far(recipe, settings)
    if made.merged is None or made.dataset is None:
        return None
    merged, dataset = made.merged, made.dataset
    registry = ModelRegistry(settings)
    version = registry.find(recipe.name, keys.candidate_key(recipe, merged, dataset))
    if version is None or version.verdict == OPEN:
        return None
    return version if _is_over(registry, version.tags.get(PARENT_RUN, "")) else None


def _is_over(registry: ModelRegistry, run_id: str) -> bool:
    """Whether the retraining that judged a version has ended well; one whose run was deleted has."""
    try:
        return bool(registry.client.get_run(run_id).info.status == "FINISHED")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return True
        raise


class Made(NamedTuple):
    """What the store has of a retraining already; nothing after the first that is missing."""

    base: ModelSnapshot | None = None
    dataset: PreparedDataset | None = None
    adapter: Adapter | None = None
    merged: MergedModel | None = None


def made_so_far(recipe: Recipe, settings: Settings) -> Made:
    """Walk through the store as far as it goes."""
    store = Store(settings.store)
    base = store.find(ModelSnapshot, "download", keys.model_key(resolve_base(recipe, settings)))
    raw = store.find(DataSnapshot, "raw", keys.data_key(*resolve_data(recipe, settings)))
    if base is None or raw is None:
        return Made(base)
    if base.quantization is not None:
        matched = _matched(recipe, base, settings, store)
        if matched is None:
            return Made(base)
        base = matched
    dataset = store.find(PreparedDataset, "prepare", keys.prepare_key(recipe, base, raw))
    if dataset is None:
        return Made(base)
    adapter = store.find(Adapter, "train", keys.train_key(recipe, base, dataset))
    if adapter is None:
        return Made(base, dataset)
    merged = store.find(MergedModel, "merge", keys.merge_key(recipe, base, adapter))
    return Made(base, dataset, adapter, merged)


def _matched(recipe: Recipe, base: ModelSnapshot, settings: Settings, store: Store) -> ModelSnapshot | None:
    """The quantized base with the twin that it was proven to have, or None."""
    twin = store.find(ModelSnapshot, "download", keys.model_key(resolve_twin(recipe, base, settings)))
    proof = twin and store.find(TwinProof, "match", keys.twin_key(base, twin))
    return base.model_copy(update={"twin": Twin(model=twin, proof=proof)}) if twin and proof else None
