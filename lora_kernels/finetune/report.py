"""What the run shows: progress, tables, the loss curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .compare import Row


@contextmanager
def progress(
    console: Console, label: str, steps: int, done: int, tokens_per_step: int
) -> Iterator[Callable[[int, float], None]]:
    """Yields `on_step(steps done, loss)`: a bar on a terminal, a line every tenth elsewhere."""
    start = time.perf_counter()

    def speed(step: int) -> float:
        return (step - done) * tokens_per_step / (time.perf_counter() - start)

    if not console.is_terminal:

        def print_step(step: int, loss: float) -> None:
            if step == steps or step % max(1, steps // 10) == 0:
                console.print(
                    f"{label}: step {step}/{steps}  loss {loss:.4f}  {speed(step):.0f} tokens/s"
                )

        yield print_step
        return

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(label, total=steps, completed=done, loss="–", speed="–")

        def advance(step: int, loss: float) -> None:
            bar.update(task, completed=step, loss=f"{loss:.4f}", speed=f"{speed(step):.0f}")

        yield advance


def comparison(rows: Sequence[Row], title: str) -> Table:
    """The frozen model, stock PEFT and the fused model side by side, 80 columns wide."""
    table = Table(
        title=title,
        title_style="bold",
        caption="a step: forward and backward, B random; differ: relative, worst of all",
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for header in ("frozen", "PEFT", "fused", "differ"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("wanted", no_wrap=True)
    for row in rows:
        table.add_row(
            f"control: {row.what}" if row.control else row.what,
            row.frozen,
            row.peft,
            row.fused,
            "" if row.difference is None else difference(row.difference, row.ratio),
            verdict(row),
        )
    return table


def difference(value: float, ratio: bool) -> str:
    return f"×{value:.3f}" if ratio else f"{value:.1e}"


def verdict(row: Row) -> Text:
    if row.limit is None:
        return Text()
    right, wrong = ("seen", "missed") if row.control else ("✓", "✗")
    sign = ">" if row.control else "≤"
    mark = (right, "") if row.ok else (wrong, "red")
    return Text.assemble(f"{sign} {row.limit:g} ", mark)


def facts(named: Mapping[str, str]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, fact in named.items():
        table.add_row(name, fact)
    return table


def plot_losses(file: Path, title: str, fused: Sequence[float], peft: Sequence[float]) -> None:
    """Write a PNG of the training losses; `peft` may be shorter, or empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        range(1, len(fused) + 1), fused, color="#1f77b4", linewidth=4, alpha=0.6, label="fused"
    )
    if peft:
        axes.plot(
            range(1, len(peft) + 1), peft, "--", color="#222222", linewidth=1.6, label="stock PEFT"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=17)
    axes.set_xlabel("step", fontsize=15)
    axes.set_ylabel("loss (nats per token)", fontsize=15)
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=15, frameon=False)
    figure.savefig(file)
