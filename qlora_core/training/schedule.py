"""Learning-rate schedules with warm-up, as plain functions of the step."""

from math import ceil, cos, pi

from qlora_core.recipe import TrainRecipe


def learning_rate(step: int, steps: int, recipe: TrainRecipe) -> float:
    """The rate of one optimizer step, counted from 1; it rises linearly to its peak, then follows the schedule.

    `cosine` and `linear` reach their end one step after the last, so that no step is wasted on a rate of zero.
    """
    peak, warmup = recipe.learning_rate, ceil(steps * recipe.warmup_ratio)
    if step <= warmup:
        return peak * step / warmup
    if recipe.schedule == "constant":
        return peak
    progress = (step - warmup - 1) / max(1, steps - warmup)
    share = 0.5 * (1 + cos(pi * progress)) if recipe.schedule == "cosine" else 1 - progress
    return peak * (recipe.min_learning_rate_ratio + (1 - recipe.min_learning_rate_ratio) * share)
