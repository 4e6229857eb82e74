"""The loop around the steps, with a model that computes nothing."""

import weakref

import pytest
import torch
from accelerate import Accelerator

from qlora_core.errors import TrainingError
from qlora_core.events import Metrics, Note, Progress, ignore
from qlora_core.recipe import EarlyStopping, TrainRecipe
from qlora_core.training.data_parallel import DataParallel
from qlora_core.training.engine.pack import Pack, pack_rows
from qlora_core.training.loop import Loop, plan_work
from qlora_core.training.stopping import EVALUATION_LOSS

from .conftest import spec


class Counting(torch.nn.Module):
    """Two rows a pass; remembers the packs that it was asked to make, and how many of them lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.made: list[weakref.ref] = []
        self.most_alive = 0

    def split(self, step, lengths, processes):
        return [step[at : at + 2] for at in range(0, len(step), 2)]

    def collate(self, rows) -> Pack:
        pack = pack_rows(rows, fill_up=False)
        self.made.append(weakref.ref(pack.input_ids))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.made))
        return pack

    def shrink(self) -> bool:
        return False

    def forward(self, pack: Pack) -> torch.Tensor:
        return torch.full((), float(len(pack.targets)))


def loop_of(recipe, base, dataset, tmp_path, report=ignore) -> tuple[Loop, Counting]:
    told = spec(recipe, base, dataset, tmp_path)
    module = Counting()
    optimizer = torch.optim.AdamW([{"params": [module.weight], "lr_scale": 1.0}])
    parallel = DataParallel(Accelerator(cpu=True), module, optimizer, 1.0, torch.float32)
    return Loop(told, plan_work(told), module, parallel, {}, 1e12, report), module


def test_evaluation_holds_one_pass_of_rows_at_a_time(base, dataset, tmp_path):
    done: list[int] = []
    loop, module = loop_of(
        TrainRecipe(), base, dataset, tmp_path, lambda e: done.append(e.done) if isinstance(e, Progress) else None
    )
    assert loop.evaluate() == 1.0, "each trained token was given the loss 1"
    assert done == list(range(1, len(module.made) + 1))
    assert len(module.made) > 3
    assert module.most_alive <= 2, "the one that is computed, and the next while it takes its place"


def test_only_an_evaluation_can_end_training_early(base, dataset, tmp_path):
    recipe = TrainRecipe(early_stopping=EarlyStopping(patience=1), evaluate_every_steps=2)
    loop, _ = loop_of(recipe, base, dataset, tmp_path)
    losses = [(1, 2.0), (2, 1.0), (3, 1.5)]
    loop.history = [Metrics(step=step, values={"loss": 1.0, EVALUATION_LOSS: loss}) for step, loss in losses]
    assert loop._is_exhausted()
    loop.history.append(Metrics(step=4, values={"loss": 1.0}))
    assert not loop._is_exhausted(), "no evaluation since it was asked last"


class Starving(Counting):
    """Runs out of memory until its passes have been made smaller so many times."""

    def __init__(self, times: int, smaller: bool) -> None:
        super().__init__()
        self.times, self.smaller = times, smaller

    def shrink(self) -> bool:
        self.times -= 1
        return self.smaller

    def forward(self, pack: Pack) -> torch.Tensor:
        if self.times > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.weight.sum() + len(pack.targets)


def starving(times: int, smaller: bool, alone: bool, base, dataset, tmp_path, report=ignore) -> Loop:
    loop, _ = loop_of(TrainRecipe(max_steps=1), base, dataset, tmp_path, report)
    loop.batches = loop.parallel.module = Starving(times, smaller)
    loop.parallel.can_repeat = alone
    return loop


def test_a_step_that_ran_out_of_memory_is_repeated_with_less_and_said(base, dataset, tmp_path):
    notes: list[str] = []
    report = lambda event: notes.append(event.message) if isinstance(event, Note) else None  # noqa: E731
    starving(2, True, True, base, dataset, tmp_path, report)._step(1)
    assert notes == ["step 1 ran out of memory; it is repeated with less"] * 2


@pytest.mark.parametrize(("smaller", "alone"), [(False, True), (True, False)], ids=["as small as can be", "together"])
def test_a_run_that_memory_cannot_hold_ends_with_what_to_set(smaller, alone, base, dataset, tmp_path):
    loop = starving(1, smaller, alone, base, dataset, tmp_path)
    with pytest.raises(
        TrainingError, match=r"step 1 ran out of memory in process 0.*train\.activation_memory to small"
    ):
        loop._step(1)
