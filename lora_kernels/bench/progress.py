"""Lines of output above a bar that says how much is left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec


@contextlib.contextmanager
def printed(silent: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Give a function that prints a head and up to `total` lines, with a bar on a terminal."""
    if silent:
        yield lambda line: None
    elif not sys.stdout.isatty() or find_spec("rich") is None:
        yield lambda line: print(line, flush=True)
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=total, completed=-1)  # the head is the first line

            def say(line: str) -> None:
                bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
                bar.advance(task)

            yield say
