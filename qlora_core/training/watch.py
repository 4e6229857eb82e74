"""Stop a run that has gone wrong before it overwrites what was good."""

from collections.abc import Sequence
from math import isfinite
from statistics import median

from qlora_core.errors import TrainingError
from qlora_core.events import Metrics
from qlora_core.recipe import LossSpike

ADVICE = "Lower train.learning_rate, raise train.warmup_ratio, or look at the rows of these steps"
SKIPPED_UPDATES = 20
"""How many updates in a row fp16's loss scaling may skip while it looks for its scale."""


def refuse_divergence(step: int, loss: float, grad_norm: float, unscaled_before: int | None = None) -> None:
    """Stop when an update is broken.

    Args:
        step: of the update.
        loss: mean over its trained tokens.
        grad_norm: before clipping.
        unscaled_before: under fp16, how many updates in a row were skipped because their gradient overflowed.

    Raises:
        TrainingError: the loss or the gradient is not a finite number.
    """
    skippable = unscaled_before is not None and unscaled_before < SKIPPED_UPDATES
    if isfinite(loss) and (isfinite(grad_norm) or skippable):
        return
    raise TrainingError(
        f"step {step} has loss {loss} and gradient norm {grad_norm}, and both must be finite. The last checkpoint "
        f"before it is kept. {ADVICE}"
    )


def steps_in_spike(history: Sequence[Metrics], limits: LossSpike) -> int:
    """How many of the newest steps, in a row, lie above what the steps before them had; 0 while there are too few."""
    losses = [metrics.values["loss"] for metrics in history[-limits.window_steps - limits.patience_steps :]]
    for count in range(min(limits.patience_steps, len(losses)), 0, -1):
        before = losses[:-count]
        if len(before) >= limits.window_steps and min(losses[-count:]) > median(before) + limits.rise:
            return count
    return 0


def refuse_spike(history: Sequence[Metrics], limits: LossSpike) -> None:
    """Stop when the loss has jumped and stays there.

    Raises:
        TrainingError: the newest `patience_steps` steps all lie more than `rise` above the median before them.
    """
    count = steps_in_spike(history, limits)
    if count < limits.patience_steps:
        return
    first, last = history[-count], history[-1]
    raise TrainingError(
        f"the loss rose to {last.values['loss']:.3f} at step {last.step}: since step {first.step} it is more than "
        f"{limits.rise} above the median of the {limits.window_steps} steps before. The last checkpoint before the "
        f"rise is kept. {ADVICE}; train.loss_spike sets these limits, null turns them off"
    )
