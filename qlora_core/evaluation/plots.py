"""Plots as inline SVG that takes its colours and its typeface from the page around it."""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SIZE_INCHES = (5.6, 2.7)
SMOOTH_FROM_POINTS = 60

# matplotlib wants colours, the page has names for them: each stands for a CSS variable until the SVG is done
INK, MUTED, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
CSS_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--line", FIRST: "--first", SECOND: "--second"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def read_curve(path: Path | None) -> list[dict[str, float]]:
    """The points of a training run, JSON lines with at least `step`; a line that was cut off is left out."""
    if path is None or not path.is_file():
        return []
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and "step" in point:
            points.append({key: value for key, value in point.items() if isinstance(value, int | float)})
    return points


def plot_loss(points: Sequence[Mapping[str, float]]) -> str:
    """Training loss over steps, smoothed where there are many, and evaluation loss where it was measured."""

    def draw(axes: Axes) -> None:
        steps, losses = _series(points, "loss")
        many = len(steps) >= SMOOTH_FROM_POINTS
        axes.plot(steps, _smooth(losses) if many else losses, color=FIRST, linewidth=1.8, label="training")
        if many:
            axes.plot(steps, losses, color=FIRST, linewidth=1, alpha=0.3)
        at, evaluated = _series(points, "evaluation_loss")
        if len(at):
            axes.plot(at, evaluated, color=SECOND, linewidth=1.8, marker="o", markersize=4, label="evaluation")
            axes.legend(loc="upper right")
        axes.set_ylim(bottom=0)
        _label_steps(axes)

    return _svg("Loss over training steps", draw)


def plot_learning_rate(points: Sequence[Mapping[str, float]]) -> str:
    """Learning rate over steps, as it was used."""

    def draw(axes: Axes) -> None:
        axes.plot(*_series(points, "learning_rate"), color=FIRST, linewidth=1.8)
        axes.set_ylim(bottom=0)
        _label_steps(axes)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)

    return _svg("Learning rate over training steps", draw)


def plot_lengths(lengths_by_split: Mapping[str, Sequence[int]]) -> str:
    """How long the rows are, in tokens, training and evaluation side by side."""

    def draw(axes: Axes) -> None:
        longest = max((max(lengths, default=1) for lengths in lengths_by_split.values()), default=1)
        edges = np.linspace(0, longest + 1, 25).tolist()
        axes.hist(
            [list(lengths) for lengths in lengths_by_split.values()],
            bins=edges,
            stacked=True,
            color=[FIRST, SECOND][: len(lengths_by_split)],
            label=list(lengths_by_split),
        )
        axes.legend(loc="upper right")
        axes.set_xlabel("tokens in a row")
        axes.set_ylabel("rows")

    return _svg("Row lengths in tokens", draw)


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _series(points: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    chosen = [point for point in points if name in point]
    return [point["step"] for point in chosen], [point[name] for point in chosen]


def _smooth(values: Sequence[float]) -> Any:
    """A running mean over a twentieth of the run; its ends are means over what is there."""
    width = max(3, len(values) // 20)
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _svg(label: str, draw: Callable[[Axes], None]) -> str:
    """An `<svg>` element without fixed size; the label also keeps the ids of several plots on one page apart."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": label}):
        figure = Figure(figsize=SIZE_INCHES, layout="tight")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), label)


def _for_page(svg: str, label: str) -> str:
    """Leave out what a page does not need or must not repeat: prolog, size, metadata, style sheet, typeface, ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg)
    svg = re.sub(r' xlink:href="', ' href="', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
