"""float16 and its loss scale, under DDP and ZeRO: what overflows is skipped, counted, said, and does no harm."""

import json
from math import log2
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core.artifacts import Adapter, PreparedDataset
from qlora_core.events import Metrics, Note, ignore
from qlora_core.process import Group, run_child
from qlora_core.recipe import Lora, TrainRecipe
from qlora_core.store import sha256_of_file
from qlora_core.training import worker
from tests.unit.training import half
from tests.unit.training.conftest import spec
from tests.unit.training.test_zero import start_from

WHOLE = TrainRecipe(
    lora=Lora(rank=4, alpha=8),
    epochs=8,
    learning_rate=1e-2,
    checkpoint_every_steps=2,
    keep_checkpoints=4,
    processes=1,
)
TOO_HIGH = 2.0**22


def whole(dataset: PreparedDataset, **updates: object) -> TrainRecipe:
    """Every step sees all rows, so that a skipped one leaves the gradient as it was."""
    return WHOLE.model_copy(update={"effective_batch_rows": dataset.train_rows, **updates})


@pytest.fixture(scope="module")
def exact(base, dataset, tmp_path_factory) -> Path:
    """A run in float32."""
    into = tmp_path_factory.mktemp("exact")
    worker.run(spec(whole(dataset), base, dataset, into).model_dump(mode="json"), ignore)
    return into


def with_scale(done: Path, step: int, scale: float, into: Path) -> Path:
    """A work directory as a run leaves it that was killed soon after `step`, with a loss scale of its own."""
    folder = start_from(done, step, into) / "checkpoints" / f"step-{step:08d}"
    state = {"scaler.scale": torch.tensor(scale), "scaler._growth_tracker": torch.tensor(0.0)}
    save_file(load_file(folder / "state.safetensors") | state, folder / "state.safetensors")
    facts = {"step": step, "sha256": sha256_of_file(folder / "state.safetensors")}
    (folder / "state.json").write_text(json.dumps(facts))
    return into


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_updates_that_overflow_are_skipped_and_the_rest_are_as_in_float32(strategy, exact, base, dataset, tmp_path):
    into = with_scale(exact, 2, TOO_HIGH, tmp_path / "work")
    recipe = whole(dataset, processes=2, strategy=strategy)
    events: list[Metrics | Note] = []
    group = Group(processes=2, rendezvous=strategy != "ddp")
    made = run_child(f"{half.__name__}:run", spec(recipe, base, dataset, into), into / "child", events.append, group)
    assert Adapter.model_validate(made).steps == 8
    skipped = [line["step"] for line in history(into) if "grad_norm" not in line]
    assert skipped, "nothing overflowed"
    said = [event.message for event in events if isinstance(event, Note) and "overflowed" in event.message]
    assert said == [
        f"step {step} overflowed float16: its update was skipped, the loss scale halved" for step in skipped
    ]
    assert history(into)[-1]["skipped_updates"] == len(skipped)
    applied = next(line for line in history(into)[2:] if "grad_norm" in line)
    assert applied["grad_norm"] == pytest.approx(history(exact)[2]["grad_norm"], rel=0.02)
    assert applied["loss"] == pytest.approx(history(exact)[2]["loss"], rel=1e-3)
    after = load_file(into / "checkpoints" / "step-00000008" / "state.safetensors")
    assert log2(TOO_HIGH) - log2(float(after["scaler.scale"])) == len(skipped)
    assert float(after["scaler._growth_tracker"]) == 6 - len(skipped)
