"""Learning-rate schedules with warm-up, as plain functions of the step."""

from math import ceil, cos, pi


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """The rate of one optimizer step, counted from 1; it rises linearly to `peak`, then follows the schedule.

    `cosine` and `linear` reach zero one step after the last, so that no step is wasted on a rate of zero.
    """
    warmup = ceil(steps * warmup_ratio)
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup - 1) / max(1, steps - warmup)
    return peak * (0.5 * (1 + cos(pi * progress)) if schedule == "cosine" else 1 - progress)
