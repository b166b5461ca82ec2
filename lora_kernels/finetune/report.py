"""Progress and tables that a run prints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from .provenance import UNDER_LOAD

LOG_COLUMNS = 120


def new_console() -> Console:
    """Return a console for text that may contain brackets; its lines in a log are LOG_COLUMNS."""
    console = Console(markup=False, highlight=False)
    if not (console.is_terminal or os.environ.get("COLUMNS")):
        console.width = LOG_COLUMNS
    return console


class Progress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Show each step's loss in a progress bar, or without a terminal in ten lines.

    Use `bar` as a context manager. After a signal, the trainer finishes the step, saves a
    checkpoint, and stops. The speed is in tokens if the data count theirs (`ChatData`), else in
    rows; of several processes the first shows it, for all.

    caught: the signals received.
    """

    def __init__(self, console: Console, label: str) -> None:
        self.label = label
        self.caught = list[int]()
        self.bar = rich.progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]}  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows, self.unit = args.train_batch_size * args.gradient_accumulation_steps, "rows"
        rows *= args.world_size
        report = getattr(getattr(kwargs.get("train_dataloader"), "dataset", None), "report", None)
        self.per_step = rows
        if report is not None:
            self.per_step, self.unit = rows * report.tokens // report.examples, "tokens"
        self.bar.start()
        self.start, self.done = time.perf_counter(), state.global_step
        self.steps = state.max_steps
        counts = {"total": self.steps, "completed": self.done}
        self.task = self.bar.add_task(self.label, **counts, loss="–", speed="–")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        step, loss, seconds = state.global_step, logs["loss"], time.perf_counter() - self.start
        speed = f"{(step - self.done) * self.per_step / seconds:.0f} {self.unit}/s"
        self.bar.update(self.task, completed=step, loss=f"{loss:.4f}", speed=speed)
        if self.bar.disable and (step == self.steps or step % max(1, self.steps // 10) == 0):
            said = f"{self.label}: step {step}/{self.steps}  loss {loss:.4f}  {speed}"
            self.bar.console.print(said)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def show_stages(console: Console, label: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows one more of `total` pieces of work as done, and its stage.

    On a terminal it moves a progress bar; elsewhere each stage is a line.
    """
    said = list[str]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with rich.progress.Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total)

        def advance(stage: str) -> None:
            bar.update(task, advance=1, description=f"{label}: {stage}")
            if bar.disable and stage not in said:
                said.append(stage)
                console.print(f"{label}: {stage}")

        yield advance


@dataclass(frozen=True)
class Row:
    """One row of `comparison_table`: `difference` is relative, or with `ratio` a ratio.

    A control is a comparison with a deliberate error. It passes if the limit is exceeded.

    others: the share of CPU time that other programs took while the row was timed, if it is known.
    """

    what: str
    difference: float | None = None
    limit: float | None = None
    frozen: str = ""
    peft: str = ""
    fused: str = ""
    ratio: bool = False
    control: bool = False
    others: float | None = None

    @property
    def under_load(self) -> bool:
        return self.others is not None and self.others > UNDER_LOAD

    @property
    def ok(self) -> bool | None:
        if self.difference is None or self.limit is None:
            return None
        if self.control:
            return self.difference > self.limit
        return self.difference <= self.limit  # NaN fails

    @property
    def difference_text(self) -> str:
        if self.difference is None:
            return ""
        return f"×{self.difference:.3f}" if self.ratio else f"{self.difference:.1e}"


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """Return a table of the frozen model, stock PEFT and the fused model, 80 columns wide."""
    caption = (
        "a step: forward and backward; it adds: its peak memory over what was in use before it; "
        "differ: relative, worst"
    )
    layout: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "box": None}
    layout |= {"padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title=title, title_style="bold", caption=caption, **layout)
    for header in ("", "frozen", "PEFT", "fused", "differ", "wanted"):
        table.add_column(
            header, justify="left" if header in ("", "wanted") else "right", no_wrap=True
        )
    for row in rows:
        what = f"control: {row.what}" if row.control else row.what
        table.add_row(what, row.frozen, row.peft, row.fused, row.difference_text, verdict(row))
    return table


def load_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that was timed under load."""
    return [
        f"{row.what}: under load, other programs took {row.others:.0%} of the processors: no result"
        for row in rows
        if row.under_load
    ]


def verdict(row: Row) -> Text:
    if row.under_load:
        return Text("no result", "red")
    if row.limit is None:
        return Text()
    right, wrong = ("seen", "missed") if row.control else ("✓", "✗")
    sign = ">" if row.control else "≤"
    mark = (right, "") if row.ok else (wrong, "red")
    return Text.assemble(f"{sign} {row.limit:g} ", mark)


def facts_table(named: Mapping[str, str]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, fact in named.items():
        table.add_row(name, fact)
    return table
