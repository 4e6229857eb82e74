"""One optimizer step: the loss of all its trained tokens, over all micro-batches and processes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel

from qlora_core.errors import TrainingError
from qlora_core.modeling.loss import Batch, token_loss


class LossModule(torch.nn.Module):
    """The adapted model as a function from a batch to the sum of its trained tokens' losses.

    A module of its own, because distributed wrappers hook into `forward`.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of losses, 0-d, fp32."""
        return token_loss(self.model.get_base_model(), batch).loss_sum


class StepResult(NamedTuple):
    """What one optimizer step saw."""

    loss: float
    grad_norm: float


def train_step(
    accelerator: Accelerator,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    trained_tokens: int,
    max_grad_norm: float,
) -> StepResult:
    """Accumulate the gradient of this process's micro-batches, clip it, and update the adapter.

    The loss is divided by `trained_tokens`, the number in the whole step over all processes, so the gradient does
    not depend on how the step was split.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with accelerator.autocast(), _synchronized(accelerator, module, last):
            batch_sum = module(batch.to(accelerator.device))
            # gradients are averaged over processes, the step's mean is over tokens: undo the former
            accelerator.backward(batch_sum * accelerator.num_processes / trained_tokens)
        loss_sum += batch_sum.detach()
    grad_norm = accelerator.clip_grad_norm_(module.parameters(), max_grad_norm)
    optimizer.step()
    loss = float(accelerator.reduce(loss_sum, "sum")) / trained_tokens
    return StepResult(loss, float(grad_norm))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Give a step its own random numbers, so that a resumed run draws what an uninterrupted one would have."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def refuse_divergence(step: int, result: StepResult) -> None:
    """Stop before a broken update is ever saved.

    Raises:
        TrainingError: the loss or the gradient is not a finite number.
    """
    if all(abs(value) < float("inf") for value in result):
        return
    raise TrainingError(
        f"step {step} has loss {result.loss} and gradient norm {result.grad_norm}, and both must be finite. The last "
        "checkpoint before it is kept. Lower train.learning_rate, raise train.warmup_ratio, or look at the rows "
        "that the log names for this step"
    )


def _synchronized(accelerator: Accelerator, module: torch.nn.Module, last: bool):  # type: ignore[no-untyped-def]
    """Processes exchange gradients once a step, at its last micro-batch."""
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(module)
