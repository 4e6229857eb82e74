"""ZeRO on two CPU processes: the same losses as one process has, whatever happens in between."""

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qlora_core.errors import ChildError, TrainingError
from qlora_core.events import Metrics, ignore
from qlora_core.recipe import Lora, TrainRecipe
from qlora_core.training.launch import train
from qlora_core.training.schedule import learning_rate
from qlora_core.training.worker import run
from qlora_core.training.zero import zero_settings
from tests.unit.training.conftest import losses, spec

ONE = TrainRecipe(
    lora=Lora(rank=4, alpha=8),
    epochs=10,
    max_steps=8,
    effective_batch_rows=8,
    micro_batch_size=2,
    learning_rate=1e-2,
    max_grad_norm=0.5,
    checkpoint_every_steps=2,
    keep_checkpoints=4,
    processes=1,
)
TOLERANCE = 1e-4
END_S = 30.0


@pytest.fixture(scope="module")
def one(base, dataset, tmp_path_factory) -> Path:
    """An uninterrupted run of one process without ZeRO."""
    into = tmp_path_factory.mktemp("one")
    run(spec(ONE, base, dataset, into).model_dump(mode="json"), ignore)
    assert len(losses(into)) == 8
    return into


def start_from(done: Path, step: int, into: Path) -> Path:
    """A work directory as a run leaves it that was killed soon after `step`."""
    name = f"step-{step:08d}"
    shutil.copytree(done / "checkpoints" / name, into / "checkpoints" / name)
    shutil.copy(done / "history.jsonl", into)
    return into


def kill_a_rank(at_step: int, killed: list[float]):
    def report(event):
        if isinstance(event, Metrics) and event.step == at_step:
            ranks = [p for p in psutil.Process().children(recursive=True) if p.environ().get("RANK") == "1"]
            os.kill(ranks[0].pid, signal.SIGKILL)
            killed.append(time.monotonic())

    return report


def test_zero2_equals_one_process_through_a_kill_and_other_numbers_of_processes(one, base, dataset, tmp_path):
    two = ONE.model_copy(update={"processes": 2, "strategy": "zero2"})
    into, killed = start_from(one, 2, tmp_path / "two"), []
    with pytest.raises(ChildError, match="SIGKILL"):
        train(two, 3, base, dataset, into, kill_a_rank(5, killed))
    assert time.monotonic() - killed[0] < END_S
    assert not [p for p in psutil.Process().children(recursive=True) if "RANK" in p.environ()]

    saved = max(int(folder.name.removeprefix("step-")) for folder in (into / "checkpoints").iterdir())
    seen: list[Metrics] = []
    adapter = train(two, 3, base, dataset, into, lambda e: seen.append(e) if isinstance(e, Metrics) else None)
    assert [event.step for event in seen] == list(range(saved + 1, 9)), "rank 0 alone reports, from the checkpoint on"
    assert losses(into) == pytest.approx(losses(one), abs=TOLERANCE)
    assert [e.values["learning_rate"] for e in seen] == [learning_rate(e.step, 8, ONE) for e in seen]
    assert adapter.trainable_parameters == sum(t.numel() for t in load_file(one / "adapter_model.safetensors").values())
    assert_same_adapter(into, one)

    again = start_from(into, 6, tmp_path / "one again")
    run(spec(ONE, base, dataset, again).model_dump(mode="json"), ignore)
    assert losses(again) == pytest.approx(losses(one), abs=TOLERANCE)
    assert_same_adapter(again, one)


def assert_same_adapter(got: Path, expected: Path) -> None:
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (got, expected))
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-3) for name in theirs)


def test_zero3_divides_a_4_bit_base_and_loses_nothing(one, base, dataset, tmp_path):
    divide_all = {
        "zero_optimization": {"stage3_param_persistence_threshold": 0}
    }  # else DeepSpeed keeps small ones whole
    two = ONE.model_copy(update={"processes": 2, "strategy": "zero3", "deepspeed": divide_all})
    into = start_from(one, 4, tmp_path / "two")
    train(two, 3, base, dataset, into, ignore)
    assert losses(into) == pytest.approx(losses(one), abs=TOLERANCE)
    assert_same_adapter(into, one)


def test_what_the_recipe_says_cannot_be_set_a_second_time():
    notes: list[str] = []
    own = {"gradient_clipping": 9, "zero_optimization": {"reduce_scatter": False, "stage": "auto"}}
    recipe = ONE.model_copy(update={"strategy": "zero2", "deepspeed": own})
    settings = zero_settings(recipe, lambda event: notes.append(event.message))
    assert settings["gradient_clipping"] == ONE.max_grad_norm
    assert settings["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": False,
    }
    assert notes == ["train.deepspeed: gradient_clipping left aside, the recipe's own keys decide that"]


def test_settings_for_another_stage_are_refused():
    recipe = ONE.model_copy(update={"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 3}}})
    with pytest.raises(TrainingError, match=r"ZeRO stage 3 and train\.strategy for zero2"):
        zero_settings(recipe, ignore)
