"""What the run shows: progress, tables, the loss curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=steps, completed=done, loss="–", speed="–")

        def on_step(step: int, loss: float) -> None:
            speed = f"{(step - done) * tokens_per_step / (time.perf_counter() - start):.0f}"
            bar.update(task, completed=step, loss=f"{loss:.4f}", speed=speed)
            if bar.disable and (step == steps or step % max(1, steps // 10) == 0):
                console.print(f"{label}: step {step}/{steps}  loss {loss:.4f}  {speed} tokens/s")

        yield on_step


def comparison(rows: Sequence[Row], title: str) -> Table:
    """The frozen model, stock PEFT and the fused model side by side, 80 columns wide."""
    caption = "a step: forward and backward, B random; differ: relative, worst of all"
    layout: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "box": None}
    layout |= {"padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title=title, title_style="bold", caption=caption, **layout)
    for header in ("", "frozen", "PEFT", "fused", "differ", "wanted"):
        table.add_column(
            header, justify="left" if header in ("", "wanted") else "right", no_wrap=True
        )
    for row in rows:
        what = f"control: {row.what}" if row.control else row.what
        table.add_row(what, row.frozen, row.peft, row.fused, row.shown, verdict(row))
    return table


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
