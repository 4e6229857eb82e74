"""The curves of a training run as a picture."""

from collections.abc import Sequence
from math import nan
from pathlib import Path

from qlora_core.events import Metrics
from qlora_core.training.stopping import evaluations

PICTURE = "training.png"


def plot_history(history: Sequence[Metrics], folder: Path) -> None:
    """Loss with evaluation loss, learning rate and gradient norm over steps, in `folder / PICTURE`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    losses, rates, norms = figure.subplots(3, 1, sharex=True)
    steps = [metrics.step for metrics in history]
    losses.plot(steps, [metrics.values["loss"] for metrics in history], label="training")
    evaluated = evaluations(history)
    losses.plot([step for step, _ in evaluated], [loss for _, loss in evaluated], "o-", label="evaluation")
    losses.legend()
    rates.plot(steps, [metrics.values["learning_rate"] for metrics in history])
    norms.plot(steps, [metrics.values.get("grad_norm", nan) for metrics in history])  # a skipped update has none
    for axes, title in ((losses, "loss, nats a token"), (rates, "learning rate"), (norms, "gradient norm")):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    norms.set_xlabel("step")
    figure.savefig(folder / PICTURE, dpi=110)
