"""All optimizer steps of a run, with what happens between them: metrics, evaluation, checkpoints, and when to stop."""

import time
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_core.errors import TrainingError
from qlora_core.events import Metrics, Note, Progress, Report
from qlora_core.modeling.rows import TokenRows
from qlora_core.training import checkpoint
from qlora_core.training.energy import EnergyMeter
from qlora_core.training.history import read_history, write_history
from qlora_core.training.later import Later
from qlora_core.training.optimizer import Parameters, set_learning_rate
from qlora_core.training.plan import plan_steps, share_of
from qlora_core.training.schedule import learning_rate
from qlora_core.training.spec import TrainSpec
from qlora_core.training.step import BatchMaker, Parallel, Share, seed_step, train_step
from qlora_core.training.stopping import EVALUATION_LOSS, best_step, is_exhausted
from qlora_core.training.throughput import peak_memory_gib, step_operations
from qlora_core.training.watch import refuse_divergence, refuse_spike, steps_in_spike

SKIPPED = "skipped_updates"


class Work(NamedTuple):
    """What a run trains on: known to every process before the first step, and the same after any crash."""

    rows: TokenRows
    evaluation_rows: TokenRows
    steps: list[NDArray[np.int64]]
    """Row numbers of every step."""


class Pending(NamedTuple):
    """A step that the device may still be busy with."""

    step: int
    learning_rate: float
    values: Later
    """Loss and gradient norm."""


def plan_work(spec: TrainSpec) -> Work:
    """Open the prepared rows and decide which step sees which."""
    recipe = spec.recipe
    rows = TokenRows(spec.dataset.path / "train.arrow")
    lengths = rows.lengths if recipe.group_by_length else None
    return Work(
        rows=rows,
        evaluation_rows=TokenRows(spec.dataset.path / "evaluation.arrow"),
        steps=plan_steps(
            len(rows), recipe.effective_batch_rows, recipe.epochs, recipe.max_steps, spec.seed, group_by=lengths
        ),
    )


class Loop:
    """The training loop of one process."""

    def __init__(
        self,
        spec: TrainSpec,
        work: Work,
        batches: BatchMaker,
        parallel: Parallel,
        parameters: Parameters,
        peak: float,
        report: Report,
    ) -> None:
        """`peak` is what one device reaches, in operations per second."""
        self.batches = batches
        self.spec, self.recipe, self.work, self.parallel = spec, spec.recipe, work, parallel
        self.parameters, self.report = parameters, report
        self.checkpoints: Path = spec.into / "checkpoints"
        self.history: list[Metrics] = []
        self._peak = peak * parallel.processes
        self._adapter_parameters = sum(parameter.numel() for parameter in parameters.values())
        self._skipped = 0
        self._settled_at = 0.0
        self._energy = EnergyMeter(parallel.device, parallel.processes if parallel.rank == 0 else 0, self.recipe.nodes)

    def run(self, start: int) -> list[Metrics]:
        """Train from the step after `start` to the end, and return the metrics of all steps."""
        self.history = read_history(self.spec.into, start)
        pending: Pending | None = None
        self._settled_at = time.perf_counter()
        for step in range(start + 1, len(self.work.steps) + 1):
            if self._is_exhausted():
                break
            current = self._step(step)
            if pending is not None:
                self._settle(pending)
            pending = current
            if self._pauses_after(step):
                self._settle(pending)
                pending = None
                self._save_if_due(step)
        if self.parallel.rank == 0:
            write_history(self.spec.into, self.history)
        return self.history

    def _step(self, step: int) -> Pending:
        chosen, parallel = self.work.steps[step - 1], self.parallel
        if not parallel.own_schedule:
            set_learning_rate(parallel.optimizer, learning_rate(step, len(self.work.steps), self.recipe))
        rate = float(parallel.optimizer.param_groups[0]["lr"])
        seed_step(self.spec.seed, step, parallel.rank)
        shares = list(self._shares(self.work.rows, self._split(self.work.rows, chosen)))
        try:
            values = train_step(parallel, shares, int(self.work.rows.trained_tokens[chosen].sum()))
        except torch.OutOfMemoryError as error:
            if not parallel.can_repeat or not self.batches.shrink():
                raise self._out_of_memory(step) from error
        else:
            return Pending(step, rate, Later(values))
        return self._again_with_less(step)

    def _out_of_memory(self, step: int) -> TrainingError:
        """Why the run ends, and what can be set."""
        recipe = self.recipe
        alone = (
            "passes cannot get smaller"
            if self.parallel.can_repeat
            else (
                f"{self.parallel.processes} processes train together under `strategy: {recipe.strategy}`, where one "
                "cannot repeat a step alone"
            )
        )
        return TrainingError(
            f"step {step} ran out of memory in process {self.parallel.rank} on {self.parallel.device}, and {alone}. "
            f"The last checkpoint is kept. Set train.activation_memory to small (it is {recipe.activation_memory}), "
            f"train.micro_batch_size to 1 (it is {recipe.micro_batch_size}), or data.seq_len_tokens lower; see that "
            "nothing else uses the GPU; or divide the model among GPUs with train.strategy zero3"
        )

    def _again_with_less(self, step: int) -> Pending:
        """The step once more after a pass ran out of memory; nothing of the first attempt is left."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()
        torch.cuda.empty_cache()
        self.report(Note(message=f"step {step} ran out of memory; it is repeated with less"))
        return self._step(step)

    def _split(self, rows: TokenRows, chosen: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Row numbers of this process's forward passes over some rows."""
        parallel = self.parallel
        passes = self.batches.split(chosen, rows.lengths, parallel.processes)
        return share_of(passes, parallel.rank, parallel.processes)

    def _shares(self, rows: TokenRows, passes: Sequence[NDArray[np.int64]]) -> Iterator[Share]:
        """Passes as tensors, each made when it is asked for."""
        for part in passes:
            numbers = part if len(part) else [0]
            yield Share(self.batches.collate([rows[int(i)] for i in numbers]), counts=len(part) > 0)

    def _settle(self, pending: Pending) -> None:
        """Read what a step gave, one step later, and report it."""
        loss, grad_norm = pending.values.read()
        self._refuse_divergence(pending.step, loss, grad_norm)
        now = time.perf_counter()
        seconds, self._settled_at = now - self._settled_at, now
        values = {"loss": loss, "learning_rate": pending.learning_rate, **self._gradient(pending.step, grad_norm)}
        values |= self._speed(self.work.steps[pending.step - 1], seconds) | self._energy.since_last()
        if self._evaluates_after(pending.step):
            values[EVALUATION_LOSS] = self.evaluate()
            self._settled_at = time.perf_counter()
        self.history.append(Metrics(step=pending.step, values=values))
        self.report(self.history[-1])
        self.report(Progress(what="training", done=pending.step, total=len(self.work.steps), unit="steps"))
        if self.recipe.loss_spike is not None:
            refuse_spike(self.history, self.recipe.loss_spike)

    def _refuse_divergence(self, step: int, loss: float, grad_norm: float) -> None:
        scaled = self.parallel.skips_overflow
        refuse_divergence(step, loss, grad_norm, self._skipped if scaled else None)
        self._skipped = 0 if isfinite(grad_norm) else self._skipped + 1

    def _gradient(self, step: int, norm: float) -> dict[str, float]:
        """The gradient's norm; under fp16 also how many updates were skipped so far because theirs had overflowed."""
        if not self.parallel.skips_overflow:
            return {"grad_norm": norm}
        skipped = self.history[-1].values.get(SKIPPED, 0.0) if self.history else 0.0
        if isfinite(norm):
            return {"grad_norm": norm, SKIPPED: skipped}
        self.report(Note(message=f"step {step} overflowed float16: its update was skipped, the loss scale halved"))
        return {SKIPPED: skipped + 1}

    def _speed(self, chosen: NDArray[np.int64], seconds: float) -> dict[str, float]:
        lengths = self.work.rows.lengths[chosen]
        trained = int(self.work.rows.trained_tokens[chosen].sum())
        operations = step_operations(
            self.spec.base.architecture, self._adapter_parameters, [int(length) for length in lengths], trained
        )
        return {
            "tokens_per_s": float(lengths.sum()) / seconds,
            "trained_tokens_per_s": trained / seconds,
            "mfu": operations / seconds / self._peak,
            "peak_memory_gib": peak_memory_gib(self.parallel.device),
        }

    def evaluate(self) -> float:
        """Mean loss over the trained tokens of the evaluation rows, for the quantized base with the adapter on."""
        rows, module = self.work.evaluation_rows, self.parallel.module
        total = torch.zeros((), device=self.parallel.device, dtype=torch.float64)
        module.eval()
        with torch.no_grad():
            passes = self._split(rows, np.arange(len(rows)))
            for number, share in enumerate(self._shares(rows, passes), 1):
                total += module(share.batch.to(self.parallel.device)).double() * float(share.counts)
                self.report(Progress(what="evaluation loss", done=number, total=len(passes), unit="batches"))
        module.train()
        return float(self.parallel.sum(total)) / int(rows.trained_tokens.sum())

    def _is_exhausted(self) -> bool:
        limits = self.recipe.early_stopping
        if limits is None or not self.history or EVALUATION_LOSS not in self.history[-1].values:
            return False  # only an evaluation can end it, and looking at all of them each step takes ever longer
        if not is_exhausted(self.history, limits):
            return False
        self.report(Note(message=f"stopped after step {self.history[-1].step}: the evaluation loss no longer falls"))
        return True

    def _evaluates_after(self, step: int) -> bool:
        every = self.recipe.evaluate_every_steps
        return step == len(self.work.steps) or (every is not None and step % every == 0)

    def _pauses_after(self, step: int) -> bool:
        return self._evaluates_after(step) or step % self.recipe.checkpoint_every_steps == 0

    def _save_if_due(self, step: int) -> None:
        best = self.recipe.keep_best and best_step(self.history) == step
        due = step % self.recipe.checkpoint_every_steps == 0
        if due and self.recipe.loss_spike is not None and steps_in_spike(self.history, self.recipe.loss_spike):
            self.report(Note(message=f"no checkpoint after step {step}: the loss has jumped and is being watched"))
            due = False
        if not (best or due):
            return
        tensors = self.parallel.state(self.parameters)
        if self.parallel.rank != 0:
            return
        if best:  # first, as a checkpoint is not whole without it
            checkpoint.save_best(self.checkpoints, step, tensors)
        if due:
            write_history(self.spec.into, self.history)
            checkpoint.save(self.checkpoints, step, tensors, self.recipe.keep_checkpoints)
        checkpoint.prune_best(self.checkpoints, self.history)
