"""What the recipe's sources are right now, and the raw files they name."""

from collections.abc import Sequence

from qlora_core.artifacts import DataSnapshot, ModelSnapshot
from qlora_core.events import Report
from qlora_core.hub.resolve import Resolved, fetch_data, fetch_model, find_twin, resolve
from qlora_core.recipe import Recipe, Source
from qlora_core.store import Store
from tasks.keys import data_key, model_key
from tasks.settings import Settings


def resolve_base(recipe: Recipe, settings: Settings) -> Resolved:
    """The base model, pinned; nothing is fetched."""
    return resolve(recipe.model, "model", settings.downloads_folder)


def resolve_data(recipe: Recipe, settings: Settings) -> tuple[list[Resolved], list[Resolved], list[Resolved]]:
    """The row files, those of the forgetting check and those for evaluation alone, pinned; nothing is fetched."""

    def pinned(sources: Sequence[Source]) -> list[Resolved]:
        return [resolve(source, "data", settings.downloads_folder) for source in sources]

    return pinned(recipe.data.rows), pinned(recipe.data.forgetting), pinned(recipe.data.evaluation_rows)


def obtain_base(recipe: Recipe, settings: Settings, report: Report) -> ModelSnapshot:
    """The base model, from the store or fetched now."""
    base, downloads = resolve_base(recipe, settings), settings.downloads_folder
    return Store(settings.store).obtain(
        ModelSnapshot, "download", model_key(base), lambda into: fetch_model(base, downloads, into, report)
    )


def resolve_merge_base(recipe: Recipe, settings: Settings) -> Resolved | None:
    """The merge base that the recipe names, pinned; None when it names none."""
    source = recipe.merge_base
    return None if source is None else resolve(source, "model", settings.downloads_folder)


def resolve_twin(recipe: Recipe, base: ModelSnapshot, settings: Settings) -> Resolved:
    """The unquantized model behind a quantized base, pinned; nothing is fetched or proven.

    Raises:
        SourceError: it was not found; the message says what to set.
    """
    return find_twin(resolve_base(recipe, settings), base, recipe.merge_base, settings.downloads_folder)


def obtain_twin(recipe: Recipe, base: ModelSnapshot, settings: Settings, report: Report) -> ModelSnapshot:
    """The unquantized model behind a quantized base, from the store or fetched now; not proven yet."""
    twin, downloads = resolve_twin(recipe, base, settings), settings.downloads_folder
    return Store(settings.store).obtain(
        ModelSnapshot, "download", model_key(twin), lambda into: fetch_model(twin, downloads, into, report)
    )


def obtain_raw(recipe: Recipe, settings: Settings, report: Report) -> DataSnapshot:
    """The raw data files, from the store or fetched now."""
    (rows, forgetting, evaluation), downloads = resolve_data(recipe, settings), settings.downloads_folder
    return Store(settings.store).obtain(
        DataSnapshot,
        "raw",
        data_key(rows, forgetting, evaluation),
        lambda into: fetch_data(rows, forgetting, downloads, into, report, evaluation),
    )
