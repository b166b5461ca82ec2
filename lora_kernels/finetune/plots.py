"""Draw figures in one style."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STYLE: Any = {"axes.grid": True, "grid.alpha": 0.3, "axes.labelsize": 13, "axes.titlesize": 15}
STYLE |= {"xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 12}
STYLE |= {f"axes.spines.{side}": False for side in ("top", "right")} | {"legend.frameon": False}


def draw_or_explain(draw: Callable[..., None], file: Path, *args: Any) -> str:
    """Let `draw` write the PNG; return its path, or why there is none: a run must not end so.

    >>> draw_or_explain(lambda file: None, Path("losses.png"))
    'losses.png'
    """
    if find_spec("matplotlib") is None:
        return "not drawn: pip install matplotlib"
    draw(file, *args)
    return str(file)


@contextmanager
def draw_png(file: Path, size: tuple[float, float] = (9, 5.5), **grid: Any) -> Iterator[list[Any]]:
    """Yield a figure's axes, then write the figure as a PNG atomically.

    grid: keyword arguments of matplotlib's `Figure.subplots`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = list(figure.subplots(squeeze=False, **grid).flat)
        yield axes
        for each in axes:
            if each.get_legend_handles_labels()[0] and each.get_legend() is None:
                each.legend()
        partial = file.with_name(f".{file.name}")
        figure.savefig(partial, format="png")
        partial.replace(file)
