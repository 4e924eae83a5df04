"""The progress bar over a study's cells. Needs rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def cell_bar(console: Console, name: str, total: int, missing: int) -> Iterator[Callable[[], None]]:
    """A bar over a study's cells, of which some are measured already; yields what advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=total - missing)
        yield lambda: bar.advance(task)
    console.print(f"{name}: {missing} of {total} cells were to be measured")
