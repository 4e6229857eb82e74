"""Everything that can be known before compute is spent."""

from qlora_core.artifacts import ModelSnapshot, PreparedDataset, Twin, TwinProof
from qlora_core.data.prepare import inspect, prepare
from qlora_core.evaluation.evaluate import check_metrics
from qlora_core.events import Report
from qlora_core.hub.resolve import prove_twin
from qlora_core.recipe import LocalSource, Recipe
from qlora_core.store import Store
from tasks.disk import require_disk
from tasks.keys import prepare_key, twin_key
from tasks.settings import Settings
from tasks.sources import obtain_base, obtain_raw, obtain_twin, resolve_base, resolve_data, resolve_merge_base


def preflight(recipe: Recipe, settings: Settings) -> None:
    """Resolve every source, look into local data files, ask for unknown metrics and free disk; fetch nothing.

    Raises:
        QloraError: the first thing that would make the flow fail later.
    """
    check_metrics(recipe.evaluation, recipe.promotion.gates)
    resolve_base(recipe, settings)
    resolve_merge_base(recipe, settings)
    resolve_data(recipe, settings)
    for source in (*recipe.data.rows, *recipe.data.evaluation_rows):
        if isinstance(source, LocalSource) and source.path.is_file():
            inspect(source.path)
    require_disk(recipe, settings)


def prepared(recipe: Recipe, settings: Settings, report: Report) -> tuple[ModelSnapshot, PreparedDataset]:
    """The base model and the prepared rows, from the store or made now; a later flow reuses them."""
    base = _matched(recipe, obtain_base(recipe, settings, report), settings, report)
    raw = obtain_raw(recipe, settings, report)
    store = Store(settings.store)
    dataset = store.obtain(
        PreparedDataset,
        "prepare",
        prepare_key(recipe, base, raw),
        lambda into: prepare(
            recipe.data, recipe.seed, base, raw, into, report, store.newest(PreparedDataset, "prepare")
        ),
    )
    return base, dataset


def _matched(recipe: Recipe, base: ModelSnapshot, settings: Settings, report: Report) -> ModelSnapshot:
    """The base, with its proven twin if it is quantized."""
    if base.quantization is None:
        return base
    twin = obtain_twin(recipe, base, settings, report)
    proof = Store(settings.store).obtain(
        TwinProof,
        "match",
        twin_key(base, twin),
        lambda into: prove_twin(base, twin, into, report),
        keep=("proof.json",),
    )
    return base.model_copy(update={"twin": Twin(model=twin, proof=proof)})
