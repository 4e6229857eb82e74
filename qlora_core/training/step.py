"""One optimizer step: the loss of all its trained tokens, over all micro-batches and processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from qlora_core.modeling.loss import Batch, collate, token_loss
from qlora_core.modeling.rows import TokenRow
from qlora_core.training.engine.pack import Pack
from qlora_core.training.optimizer import Parameters
from qlora_core.training.plan import micro_batches
from qlora_core.training.precision import autocast

LARGEST_SEED = 2**64 - 1
"""What torch takes. Larger products of seed, step and rank are reduced to it; smaller ones stay what they were."""


class LossModule(torch.nn.Module):
    """The adapted model as a function from a batch to the sum of its trained tokens' losses.

    A module of its own, because DeepSpeed hooks into `forward`.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype, pad_id: int, micro_batch_size: int | str) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self._pad_id, self._micro_batch_size = pad_id, micro_batch_size

    def split(self, step: NDArray[np.int64], lengths: NDArray[np.int64], processes: int) -> list[NDArray[np.int64]]:
        """A step's rows as forward passes."""
        return micro_batches(step, lengths, self._micro_batch_size)

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """Rows padded to the longest."""
        return collate(rows, self._pad_id)

    def shrink(self) -> bool:
        """Halve the rows of a pass where the recipe names them."""
        if not isinstance(self._micro_batch_size, int) or self._micro_batch_size == 1:
            return False
        self._micro_batch_size //= 2
        return True

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of losses, 0-d, fp32."""
        with autocast(batch.input_ids.device, self.dtype):
            return token_loss(self.model.get_base_model(), batch).loss_sum


@runtime_checkable
class DirectLoss(Protocol):
    """A loss module that has a backward pass of its own."""

    def loss_and_grads(self, batch: Any) -> torch.Tensor:
        """Sum of losses, 0-d, fp32; its gradient is added to every `parameter.grad`."""

    def refresh(self) -> None:
        """Take over changed parameters; after every update."""

    def flat_parameters(self) -> Parameters:
        """All that is trained as few parameters, which from now on are trained in place of the many."""


class BatchMaker(Protocol):
    """How a loss module wants its rows."""

    def split(self, step: NDArray[np.int64], lengths: NDArray[np.int64], processes: int) -> list[NDArray[np.int64]]:
        """A step's rows as forward passes of all processes."""

    def collate(self, rows: Sequence[TokenRow]) -> Batch | Pack:
        """The rows of one pass as tensors."""

    def shrink(self) -> bool:
        """Make passes smaller after one ran out of memory; False when they are as small as can be."""


class Share(NamedTuple):
    """What one process does for one forward pass."""

    batch: Batch | Pack
    counts: bool
    """False for a stand-in that keeps a process with nothing left in step with the others."""


class Parallel(Protocol):
    """How processes work together on a step."""

    rank: int
    processes: int
    device: torch.device
    module: Any
    """Call it with a batch to get a loss; a wrapper hands on what it does not know itself."""
    optimizer: torch.optim.Optimizer
    own_schedule: bool
    """Whether the strategy sets the learning rate itself."""
    can_repeat: bool
    """Whether nothing but `parameter.grad` is left of a step that failed before `update`."""
    skips_overflow: bool
    """Whether an update with an infinite gradient is skipped while fp16's loss scale is looked for."""

    def accumulate(self, share: Share, trained_tokens: int, last: bool) -> torch.Tensor:
        """Add a micro-batch's part of the mean gradient; returns its loss sum, 0-d, without a graph."""

    def update(self, trained_tokens: int) -> torch.Tensor:
        """Exchange gradients, clip them, update the adapter; returns the norm before clipping, 0-d."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""

    def state(self, parameters: Parameters) -> dict[str, torch.Tensor]:
        """Weights and optimizer state, whole, whatever the number of processes; every process must call it."""

    def load_optimizer(self, tensors: dict[str, torch.Tensor], parameters: Parameters, step: int) -> None:
        """Go on from what `state` returned after `step`; the weights are in the model already."""


def train_step(parallel: Parallel, shares: Sequence[Share], trained_tokens: int) -> torch.Tensor:
    """Accumulate the gradient of this process's micro-batches, clip it, and update the adapter.

    The loss is divided by `trained_tokens`, the number in the whole step over all processes, so the gradient does
    not depend on how the step was split.

    Returns:
        mean loss and gradient norm, `[2]`, still on the device.
    """
    loss_sum = torch.zeros((), device=parallel.device)
    for number, share in enumerate(shares):
        loss_sum += parallel.accumulate(share, trained_tokens, last=number == len(shares) - 1)
    grad_norm = parallel.update(trained_tokens)
    return torch.stack([parallel.sum(loss_sum) / trained_tokens, grad_norm.to(loss_sum)])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Give a step its own random numbers, so that a resumed run draws what an uninterrupted one would have."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) & LARGEST_SEED)
