"""Training a tiny model for real, in this process and in child processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from qlora_core.events import Metrics, Note, ignore
from qlora_core.modeling.loss import collate
from qlora_core.modeling.rows import TokenRows
from qlora_core.recipe import Lora, TrainRecipe
from qlora_core.training.data_parallel import DataParallel
from qlora_core.training.launch import train
from qlora_core.training.plan import micro_batches
from qlora_core.training.step import LossModule, Share, seed_step, train_step
from qlora_core.training.worker import adapted_model, run
from tests.unit.training.conftest import losses, spec

CPU = torch.device("cpu")
RECIPE = TrainRecipe(
    lora=Lora(rank=4, alpha=8, dropout=0.1),
    epochs=10,
    max_steps=6,
    effective_batch_rows=8,
    micro_batch_size=4,
    learning_rate=1e-2,
    checkpoint_every_steps=2,
    processes=1,
)


def train_here(base, dataset, into: Path, recipe: TrainRecipe = RECIPE, report=ignore):
    return run(spec(recipe, base, dataset, into).model_dump(mode="json"), report)


def test_the_loss_falls_and_the_adapter_is_in_pefts_format(base, dataset, tmp_path):
    events: list[Metrics] = []
    adapter = train_here(base, dataset, tmp_path, report=lambda e: events.append(e) if isinstance(e, Metrics) else None)
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path) == [event.values["loss"] for event in events]
    assert adapter.train_loss < losses(tmp_path)[0] - 0.3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2, "A and B for seven linears of two layers"
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_resumed_run_equals_an_uninterrupted_one(base, dataset, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_here(base, dataset, whole)
    train_here(base, dataset, cut)
    for name in ("adapter_model.safetensors", "checkpoints/step-00000006/state.json"):
        (cut / name).unlink()  # as if the last checkpoint had been cut off while it was written
    notes: list[str] = []
    train_here(base, dataset, cut, report=lambda e: notes.append(e.message) if isinstance(e, Note) else None)
    assert "step-00000006 is damaged and was skipped" in notes
    assert "resumed after step 4" in notes
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-6)
    expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (whole, cut))
    assert all(torch.allclose(expected[name], got[name], atol=1e-6) for name in expected)


def test_a_resumed_run_keeps_the_best_adapter_of_an_uninterrupted_one(base, dataset, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe = RECIPE.model_copy(update={"keep_best": True, "evaluate_every_steps": 1, "learning_rate": 0.3})
    adapters = [train_here(base, dataset, into, recipe) for into in (whole, cut)]
    (cut / "checkpoints/step-00000006/state.json").unlink()
    adapters.append(train_here(base, dataset, cut, recipe))
    assert adapters[0].evaluation_loss == pytest.approx(adapters[2].evaluation_loss, abs=1e-6)
    expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (whole, cut))
    assert all(torch.allclose(expected[name], got[name], atol=1e-6) for name in expected)
    kept = {int(place.name[-8:]) for place in (cut / "checkpoints").glob("best-*")}
    assert len(kept) <= 2, "one for each of two checkpoints at most"


@pytest.mark.parametrize("seed", [0, 300_000_000, 2**32 - 1, 2**63, 2**64 - 1])
def test_every_seed_gives_each_step_and_process_its_own_random_numbers(seed):
    drawn = []
    for step, rank in ((1, 0), (2, 0), (1, 1), (1_000_000, 0)):
        seed_step(seed, step, rank)
        drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == 4
    seed_step(seed, 1, 0)
    assert float(torch.rand(())) == drawn[0]


def test_only_the_newest_checkpoints_are_kept(base, dataset, tmp_path):
    train_here(base, dataset, tmp_path, RECIPE.model_copy(update={"keep_checkpoints": 1}))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_the_gradient_does_not_depend_on_how_a_step_is_split(base, dataset, tmp_path):
    recipe = RECIPE.model_copy(update={"lora": Lora(rank=4, alpha=8)})
    rows, chosen = TokenRows(dataset.path / "train.arrow"), np.arange(8)
    moved, seen = [], []
    for size in (8, 3, 1):
        model = adapted_model(spec(recipe, base, dataset, tmp_path), CPU, torch.float32)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=1.0)  # moves by the gradient itself
        before = {name: p.detach().clone() for name, p in trained.items()}
        parallel = DataParallel(
            Accelerator(cpu=True), LossModule(model, torch.float32, 0, size), optimizer, 1e9, torch.float32
        )
        parts = micro_batches(chosen, rows.lengths, size)
        shares = [Share(collate([rows[int(i)] for i in part], 0), counts=True) for part in parts]
        seen.append(float(train_step(parallel, shares, int(rows.trained_tokens[chosen].sum()))[0]))
        moved.append({name: p.detach() - before[name] for name, p in trained.items()})
    assert seen == pytest.approx([seen[0]] * 3, rel=1e-5)
    for other in moved[1:]:
        assert all(torch.allclose(moved[0][name], other[name], atol=1e-6) for name in other)


def test_padding_never_carries_loss(base, dataset):
    rows = TokenRows(dataset.path / "train.arrow")
    short, long = sorted((rows[i] for i in range(8)), key=lambda row: len(row.input_ids))[::7]
    batch = collate([short, long], pad_id=2)
    assert batch.loss_mask.sum() == short.loss_mask.sum() + long.loss_mask.sum()
    assert batch.attention_mask.sum() == len(short.input_ids) + len(long.input_ids)


def test_two_processes_train_like_one(base, dataset, tmp_path):
    recipe = RECIPE.model_copy(update={"lora": Lora(rank=4, alpha=8), "max_steps": 4})
    for processes in (1, 2):
        part = recipe.model_copy(update={"processes": processes})
        train(part, 3, base, dataset, tmp_path / str(processes), ignore)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=1e-4)
