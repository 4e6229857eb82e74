"""What a retraining will write, and where: from the model's size, less what the store has already."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_core.artifacts import Architecture, ModelSnapshot
from qlora_core.errors import SourceError, StoreError
from qlora_core.hub.resolve import ModelSize, Resolved, model_size
from qlora_core.recipe import Recipe
from qlora_core.training.memory import adapter_parameters
from tasks.settings import Settings
from tasks.sources import resolve_base, resolve_merge_base
from tasks.unchanged import Made, made_so_far

SPARE_BYTES = 500_000_000
"""For rows, reports, logs and databases, and left free."""
UNKNOWN_BYTES = 1_500_000_000
"""Of a model whose size nobody says."""
CHECKPOINT_BYTES = 12
"""A trained parameter: itself and two moments of its gradient, in float32."""
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
USUAL_LAYERS = 24
BLOCK_VALUES = 12
"""Parameters of a block over the square of its width, about."""


class Need(NamedTuple):
    """Bytes that will be written below a folder."""

    what: str
    folder: Path
    bytes: int


class Disk(NamedTuple):
    """One disk: what will be written to it, and what is free."""

    folder: Path
    needs: tuple[Need, ...]
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """In all, with what must stay free."""
        return sum(need.bytes for need in self.needs) + SPARE_BYTES

    @property
    def sentence(self) -> str:
        """For people."""
        parts = ", ".join(f"{need.bytes / 1e9:.1f} GB {need.what}" for need in self.needs if need.bytes >= 5e7)
        detail = f" ({parts})" if parts else ""
        free = f"{self.free_bytes / 1e9:.1f} GB free"
        return f"about {self.needed_bytes / 1e9:.1f} GB needed at {self.folder}{detail}, {free}"


def disks_of(recipe: Recipe, settings: Settings) -> list[Disk]:
    """Every disk that a retraining writes to; folders on one disk count together.

    Raises:
        SourceError: a source cannot be listed.
    """
    return on_disks(needs_of(recipe, settings, made_so_far(recipe, settings)))


def require_disk(recipe: Recipe, settings: Settings) -> None:
    """Hold what a retraining will write against what is free.

    Raises:
        StoreError: a disk has too little; the message says what takes how much.
    """
    for disk in disks_of(recipe, settings):
        if disk.free_bytes < disk.needed_bytes:
            raise StoreError(
                f"{disk.sentence}. Free some space, or use another disk: QLORA_HOME moves everything, QLORA_DOWNLOADS "
                "what is fetched"
            )


def needs_of(recipe: Recipe, settings: Settings, made: Made) -> list[Need]:
    """What each stage will write that is not there yet."""
    needs: list[Need] = []
    base = _size(resolve_base(recipe, settings), settings)
    if made.base is None:
        needs += _fetched(base, settings, "to download the model", "the model")
    full = _full_precision(recipe, settings, made, base, needs)
    if made.adapter is None:
        state = _adapter_values(recipe, made.base, full) * CHECKPOINT_BYTES
        needs.append(Need("checkpoints and adapter", settings.store, state * (recipe.train.keep_checkpoints + 2)))
    if made.merged is None:
        needs.append(Need("the merged model", settings.store, full))
    needs.append(Need("a copy to register from", settings.store, full))
    if settings.mlflow_artifacts is not None:
        needs.append(Need("the registered model", settings.root / "mlflow", full))
    else:
        needs.append(Need("the champion to compare with", settings.store, full))
    return needs


def on_disks(needs: Sequence[Need]) -> list[Disk]:
    """The same by disk."""
    by_device: dict[int, list[Need]] = {}
    for need in needs:
        by_device.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    return [
        Disk(place, tuple(found), shutil.disk_usage(place).free)
        for found in by_device.values()
        for place in [_existing(found[0].folder)]
    ]


def _full_precision(recipe: Recipe, settings: Settings, made: Made, base: ModelSize, needs: list[Need]) -> int:
    """Bytes of the merged model; what its base takes is added to `needs` where that is another one."""
    named = resolve_merge_base(recipe, settings)
    if made.base is not None and (made.base.quantization is None or made.base.twin is not None):
        return _merged_bytes(recipe, made.base.merge_base)
    if named is not None:
        size = _size(named, settings)
        needs += _fetched(size, settings, "to download the merge base", "the merge base")
        return _in_dtype(recipe, size.stored)
    if made.base is not None:  # quantized, its twin not found yet: it is as large as its parameters in 16 bits
        stored = made.base.architecture.parameters * 2
        size = ModelSize(fetched=stored, stored=stored, shared=True)
        needs += _fetched(size, settings, "to download the merge base", "the merge base")
        return _in_dtype(recipe, stored)
    return _in_dtype(recipe, base.stored)


def _fetched(size: ModelSize, settings: Settings, fetched: str, stored: str) -> list[Need]:
    """A download, and the plain folder in the store unless the two share their blocks."""
    downloads = settings.downloads_folder
    one_disk = _existing(downloads).stat().st_dev == _existing(settings.store).stat().st_dev
    needs = [Need(fetched, downloads, size.fetched)]
    return (
        needs if size.shared and one_disk else [*needs, Need(stored or "the merge base", settings.store, size.stored)]
    )


def _size(resolved: Resolved, settings: Settings) -> ModelSize:
    try:
        size = model_size(resolved, settings.downloads_folder)
    except SourceError:  # whoever fetches it says why
        size = None
    return size or ModelSize(fetched=UNKNOWN_BYTES, stored=UNKNOWN_BYTES, shared=False)


def _merged_bytes(recipe: Recipe, base: ModelSnapshot) -> int:
    dtype = recipe.merge.dtype if recipe.merge.dtype in VALUE_BYTES else base.dtype
    return base.architecture.parameters * VALUE_BYTES.get(dtype, 4)


def _in_dtype(recipe: Recipe, stored: int) -> int:
    """Of a model whose own dtype is not known yet: 16 bits, as nearly all are published."""
    return stored * 2 if recipe.merge.dtype == "float32" else stored


def _adapter_values(recipe: Recipe, base: ModelSnapshot | None, full_bytes: int) -> int:
    if base is not None:
        return adapter_parameters(base.architecture, recipe.train.lora.rank)
    width = max(64, round((full_bytes / 2 / USUAL_LAYERS / BLOCK_VALUES) ** 0.5))
    shape = Architecture(
        model_type="", layers=USUAL_LAYERS, hidden=width, intermediate=4 * width, heads=1, kv_heads=1, vocab=0,
        context_tokens=0, parameters=0, tied_embeddings=False,
    )  # fmt: skip
    return adapter_parameters(shape, recipe.train.lora.rank)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())
