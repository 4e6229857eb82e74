"""The merge as a picture: how far each tensor moved, by layer."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qlora_core.artifacts import TensorChange


def plot_changes(changes: Sequence[TensorChange], file: Path) -> None:
    """Draw the relative change over the layers, a line for each kind of module; tensors outside layers stand at -1."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for change in changes:
        layer = re.search(r"\.(\d+)\.", change.name)
        kind = change.name.removesuffix(".weight").rpartition(".")[2]
        lines[kind].append((int(layer[1]) if layer else -1, change.relative))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for kind, points in sorted(lines.items()):
        layers, relative = zip(*sorted(points), strict=True)
        axes.plot(layers, relative, marker=".", label=kind)
    axes.set(xlabel="layer", ylabel="relative change", title="What the merge changed: |W' - W| / |W|, Frobenius")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(file, metadata={"Software": None})
