"""Checkpoints: what is damaged is skipped and said, what is whole comes back bit for bit, old ones go."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_core.errors import TrainingError
from qlora_core.events import Metrics, Note, ignore
from qlora_core.store import discard
from qlora_core.training import checkpoint
from qlora_core.training.history import write_history
from qlora_core.training.stopping import EVALUATION_LOSS

STEPS = (2, 4, 6)


def tensors(step: int) -> checkpoint.Tensors:
    return {"weight.a": torch.full((3, 4), float(step)), "optimizer.exp_avg.a": torch.arange(12.0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints after three steps of six, and the metrics of every step."""
    write_history(tmp_path, [Metrics(step=step, values={"loss": 1.0}) for step in range(1, 7)])
    for step in STEPS:
        checkpoint.save(tmp_path / "checkpoints", step, tensors(step), keep=3)
    return tmp_path / "checkpoints"


def resume(folder: Path) -> tuple[int, list[str]]:
    notes: list[str] = []
    saved = checkpoint.newest(folder, lambda event: notes.append(event.message) if isinstance(event, Note) else None)
    if saved.step:
        assert all(torch.equal(saved.tensors[name], value) for name, value in tensors(saved.step).items())
    return saved.step, notes


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda place: (place / "state.safetensors").write_bytes((place / "state.safetensors").read_bytes()[:-1]),
    "empty": lambda place: (place / "state.safetensors").write_bytes(b""),
    "one bit of a weight": lambda place: flip(place / "state.safetensors", -1),
    "one bit of the header": lambda place: flip(place / "state.safetensors", 9),
    "no tensors": lambda place: (place / "state.safetensors").unlink(),
    "no facts": lambda place: (place / "state.json").unlink(),
    "half the facts": lambda place: (place / "state.json").write_text((place / "state.json").read_text()[:20]),
    "facts that are no mapping": lambda place: (place / "state.json").write_text("[1]"),
    "another step's facts": lambda place: (place / "state.json").write_text(
        json.dumps({**json.loads((place / "state.json").read_text()), "step": 600})
    ),
    "an empty folder": lambda place: [file.unlink() for file in place.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it_and_said(folder: Path, damage):
    assert resume(folder) == (6, ["resumed after step 6"])
    damage(folder / "step-00000006")
    assert resume(folder) == (4, ["step-00000006 is damaged and was skipped", "resumed after step 4"])


def test_with_all_of_them_damaged_training_begins_anew(folder: Path):
    for step in STEPS:
        flip(folder / f"step-{step:08d}" / "state.safetensors", -1)
    step, notes = resume(folder)
    assert step == 0
    assert len(notes) == 3


def test_a_checkpoint_whose_metrics_are_gone_is_damaged_too(folder: Path):
    history = folder.parent / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines[:4]) + lines[4][:7])
    assert resume(folder)[0] == 0, "half a line leaves it open what else is wrong"
    history.write_text("".join(lines[:4]))
    assert resume(folder)[0] == 4


def test_what_a_crash_left_of_a_checkpoint_in_the_making_is_never_taken_for_one(folder: Path):
    making = folder / ".step-00000008"
    making.mkdir()
    (making / "state.safetensors").write_bytes(b"half")
    assert resume(folder)[0] == 6
    checkpoint.save(folder, 8, tensors(8), keep=2)
    assert sorted(place.name for place in folder.iterdir()) == ["step-00000006", "step-00000008"]


def evaluated(losses: dict[int, float]) -> list[Metrics]:
    """The metrics of six steps, of which some were followed by an evaluation."""
    values = {step: {"loss": 1.0} | ({EVALUATION_LOSS: losses[step]} if step in losses else {}) for step in range(1, 7)}
    return [Metrics(step=step, values=value) for step, value in values.items()]


def test_the_best_adapter_of_an_earlier_checkpoint_outlives_a_better_one_until_the_checkpoint_goes(folder: Path):
    history = evaluated({1: 5.0, 3: 3.0, 5: 1.0})
    for step in (1, 3, 5):
        checkpoint.save_best(folder, step, tensors(step))
        checkpoint.prune_best(folder, history[:step])
    # from the checkpoints after steps 2, 4 and 6, the best ones are those of steps 1, 3 and 5
    assert {place.name for place in folder.glob("best-*")} == {f"best-{step:08d}" for step in (1, 3, 5)}
    write_history(folder.parent, history)
    discard(folder / "step-00000006")
    assert checkpoint.newest(folder, ignore, keep_best=True).step == 4
    assert torch.equal(checkpoint.load_best(folder, 3)["weight.a"], tensors(3)["weight.a"]), "not those of step 5"
    checkpoint.save(folder, 8, tensors(8), keep=1)
    checkpoint.prune_best(folder, history)
    assert [place.name for place in folder.glob("best-*")] == ["best-00000005"]


def test_a_checkpoint_without_the_best_adapter_until_then_is_skipped_and_said(folder: Path):
    write_history(folder.parent, evaluated({1: 5.0, 5: 1.0}))
    checkpoint.save_best(folder, 1, tensors(1))
    notes: list[str] = []
    report = lambda event: notes.append(event.message) if isinstance(event, Note) else None  # noqa: E731
    assert checkpoint.newest(folder, report, keep_best=True).step == 4
    assert notes[0] == "step-00000006 was skipped: the best adapter until then, of step 5, is not there"
    assert checkpoint.newest(folder, ignore).step == 6, "nobody asked for the best one"


def test_a_damaged_best_adapter_is_refused_with_what_to_do(folder: Path):
    checkpoint.save_best(folder, 4, tensors(4))
    assert set(checkpoint.load_best(folder, 4)) == {"weight.a"}
    flip(folder / "best-00000004" / "state.safetensors", -1)
    for step in (4, 5):
        with pytest.raises(TrainingError, match=r"remove .* and run again"):
            checkpoint.load_best(folder, step)
