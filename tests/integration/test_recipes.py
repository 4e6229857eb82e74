"""Every shipped recipe trains two steps, with a tiny model of the same family and kind of quantization in its place."""

import json
from pathlib import Path

import pytest

from qlora_core.artifacts import DataFile, DataSnapshot, ModelSnapshot
from qlora_core.data.prepare import prepare
from qlora_core.events import Event, Metrics, ignore
from qlora_core.hub.snapshot import build
from qlora_core.recipe import DataRecipe, Recipe, load_recipe
from qlora_core.recipe.sources import LocalRows
from qlora_core.training.spec import TrainSpec
from qlora_core.training.worker import run
from tests.quantized import quantize_like_auto_gptq
from tests.tiny import COLOURS, CONTEXT_TOKENS, THINGS, write_model

PAIRS = [(f"Paint the {thing} {colour}.", f"The {thing} is {colour}.") for colour in COLOURS for thing in THINGS]
ROWS = {
    "sharegpt": lambda asked, said: {"conversations": [_turn("user", asked), _turn("assistant", said)]},
    "auto": lambda asked, said: {"conversations": [_turn("human", asked), _turn("gpt", said)]},
    "transcript": lambda asked, said: {"text": f"<s>[INST] {asked} [/INST] {said} </s>"},
}
FAMILIES = {"qwen2.5": "qwen2", "qwen3": "qwen3", "llama": "llama", "smollm2": "llama"}
"""By what the model's name begins with."""
HERE = {"strategy": "ddp", "processes": 1, "precision": "float32", "max_steps": 2, "deepspeed": None}
"""What two CPU cores need otherwise; several processes and ZeRO have tests of their own."""
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "deployments" / "recipes").glob("*.yaml"))


def _turn(role: str, said: str) -> dict[str, str]:
    return {"from": role, "value": said}


def params() -> list[object]:
    """GPTQ needs its kernels."""
    return [pytest.param(path, id=path.stem, marks=pytest.mark.gptq if "gptq" in path.stem else ()) for path in SHIPPED]


@pytest.mark.parametrize("path", params())
def test_a_shipped_recipe_trains_two_steps(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    base = tiny_base(recipe, tmp_path)
    data, raw = rows_for(recipe, tmp_path)
    dataset = prepare(data, recipe.seed, base, raw, made(tmp_path / "prepared"), ignore)
    train = recipe.train.model_copy(update=HERE)
    spec = TrainSpec(recipe=train, seed=recipe.seed, base=base, dataset=dataset, into=made(tmp_path / "train"))
    events: list[Event] = []
    adapter = run(spec.model_dump(mode="json"), events.append)
    assert adapter.steps == 2
    assert (tmp_path / "train" / "adapter_model.safetensors").is_file()
    losses = [event.values["loss"] for event in events if isinstance(event, Metrics) and "loss" in event.values]
    assert len(losses) == 2


def tiny_base(recipe: Recipe, folder: Path) -> ModelSnapshot:
    name = recipe.model.repo.partition("/")[2] if hasattr(recipe.model, "repo") else recipe.name
    family = next(family for start, family in FAMILIES.items() if name.lower().startswith(start))
    model = write_model(folder / "plain", family=family)
    if "GPTQ-Int4" in name:
        model = quantize_like_auto_gptq(model, folder / "int4", 4)
    base = build({"into": model, "gguf": None, "source": name, "revision": "1"}, ignore)
    assert base.quantization == ("gptq-int4" if "GPTQ-Int4" in name else None)
    assert base.architecture.model_type == family
    return base.model_copy(update={"digest": "b" * 64})


def rows_for(recipe: Recipe, folder: Path) -> tuple[DataRecipe, DataSnapshot]:
    file = made(folder / "raw") / "rows.json"
    kind = recipe.data.format if recipe.data.tool_calls is None else "auto"
    file.write_text(json.dumps([ROWS[kind](*pair) for pair in PAIRS]))
    swapped = {"rows": (LocalRows(source="local", path=file),), "forgetting": ()}
    if recipe.data.tool_calls is not None:  # these rows call no tools
        swapped |= {"tool_calls": None, "split": DataRecipe.model_fields["split"].default}
    files = (DataFile(name=file.name, source="tiny", bytes=file.stat().st_size),)
    swapped["seq_len_tokens"] = min(recipe.data.seq_len_tokens, CONTEXT_TOKENS)
    return recipe.data.model_copy(update=swapped), DataSnapshot(path=file.parent, rows=files)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
