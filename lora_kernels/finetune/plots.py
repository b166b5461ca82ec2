"""The style of every figure that a recipe writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def draw_png(file: Path, size: tuple[float, float] = (9, 5.5), **grid: Any) -> Iterator[list[Any]]:
    """Yield a figure's axes, then write the figure as a PNG, whole or not at all.

    grid: of matplotlib's `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(squeeze=False, **grid).flat)
    yield axes
    for each in axes:
        each.grid(alpha=0.3)
        each.tick_params(labelsize=11)
        each.spines[["top", "right"]].set_visible(False)
        each.xaxis.label.set_size(13)
        each.yaxis.label.set_size(13)
        each.title.set_size(15)
        if each.get_legend_handles_labels()[0] and each.get_legend() is None:
            each.legend(fontsize=12, frameon=False)
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, format="png")
    partial.replace(file)
