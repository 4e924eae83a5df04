"""A progress bar with images/s on a terminal, one line an epoch anywhere. Needs rich."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ConsoleObserver:
    """Shows a run on the console; use it as a context manager around the run.

    Args:
        console: where to print; the moving bar only appears on a terminal.
        label: what is being trained, in front of every line.
    """

    def __init__(self, console: Console, label: str) -> None:
        self.label = label
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None, rate=0.0)
        self._steps = self._epochs = 0
        self._images, self._since = 0, 0.0

    def __enter__(self) -> ConsoleObserver:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start(self, epochs: int, steps: int, epoch: int, step: int) -> None:
        """Sets the bar to where the run begins."""
        self._epochs, self._steps = epochs, steps
        self._bar.update(self._task, total=epochs * steps, completed=epoch * steps + step)
        self._describe(epoch)

    def step(self, images: int) -> None:
        """Advances the bar; the rate is that of the epoch so far."""
        self._images += images
        self._bar.update(self._task, advance=1, rate=self._images / (time.perf_counter() - self._since))

    def epoch(self, row: dict[str, float]) -> None:
        """Prints the epoch's line."""
        self._bar.console.print(
            f"{self.label}  epoch {row['epoch']:>3.0f}/{self._epochs}  loss {row['train_loss']:.4f}  "
            f"train {row['train_accuracy']:7.2%}  test {row['test_accuracy']:7.2%}  "
            f"{row['images_per_second']:>9,.0f} images/s"
        )
        self._describe(int(row["epoch"]))

    def _describe(self, epoch: int) -> None:
        text = f"{self.label}  epoch {min(epoch + 1, self._epochs)}/{self._epochs}"
        self._bar.update(self._task, description=text)
        self._images, self._since = 0, time.perf_counter()
