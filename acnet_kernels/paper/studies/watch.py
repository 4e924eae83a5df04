"""What a study shows of its progress: a bar over a network's cells, and how long the rest will take. Needs rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..training.progress import ConsoleObserver
from .study import Network


@contextmanager
def cell_bar(console: Console, label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over the cells of one network; yields what advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


class Forecast:
    """How long the rest of a study takes, from what its networks took so far.

    Args:
        epochs: network → the epochs of its training.
        console: where to print.
        clock: seconds.
    """

    def __init__(
        self, epochs: Mapping[Network, int], console: Console, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._left = dict(epochs)
        self._total, self._console, self._clock = len(epochs), console, clock
        self._epochs: dict[str, list[float]] = {}  # network's name → seconds of each epoch
        self._measuring: list[float] = []  # seconds of each network

    @contextmanager
    def training(self, network: Network, label: str) -> Iterator[_Timed]:
        """Yields the observer of the network's training."""
        with ConsoleObserver(self._console, label) as shown:
            yield _Timed(self, network, shown)

    @contextmanager
    def measuring(self, label: str, cells: int) -> Iterator[Callable[[], None]]:
        """Around a network's measurements; yields what says that one is done."""
        began = self._clock()
        with cell_bar(self._console, label, cells) as advance:
            yield advance
        self._measuring.append(self._clock() - began)

    def done(self, network: Network) -> None:
        """The network is trained and measured."""
        del self._left[network]
        self._console.print(self)

    def epoch(self, network: Network, seconds: float) -> None:
        """An epoch of the network's training took so long."""
        first = not self._epochs
        self._epochs.setdefault(network.net, []).append(seconds)
        self._left[network] -= 1
        if first:  # the first network may take hours
            self._console.print(self)

    def resumed(self, network: Network, epochs: int) -> None:
        """So many epochs of the network are done before it begins."""
        self._left[network] -= epochs

    def seconds(self) -> float:
        """What is left; networks that were not seen yet are taken to be as the mean of those that were."""
        known = {net: mean(seconds) for net, seconds in self._epochs.items()}
        usual = mean(known.values()) if known else 0.0
        training = sum(epochs * known.get(network.net, usual) for network, epochs in self._left.items())
        return training + len(self._left) * (mean(self._measuring) if self._measuring else 0.0)

    def __str__(self) -> str:
        done = f"{self._total - len(self._left)} of {self._total} networks done"
        return f"{done}, about {duration(self.seconds())} left for the rest" if self._left else done


class _Timed:
    """Tells a forecast of every epoch, and a console of everything."""

    def __init__(self, forecast: Forecast, network: Network, shown: ConsoleObserver) -> None:
        self._forecast, self._network, self._shown = forecast, network, shown
        self._since = 0.0

    def start(self, epochs: int, steps: int, epoch: int, step: int) -> None:
        self._forecast.resumed(self._network, epoch)
        self._since = self._forecast._clock()
        self._shown.start(epochs, steps, epoch, step)

    def step(self, images: int) -> None:
        self._shown.step(images)

    def epoch(self, row: dict[str, float]) -> None:
        self._shown.epoch(row)
        now = self._forecast._clock()
        self._forecast.epoch(self._network, now - self._since)
        self._since = now


def duration(seconds: float) -> str:
    """'45 s', '12 min' or '3 h 10 min'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
