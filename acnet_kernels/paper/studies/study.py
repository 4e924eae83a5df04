"""What every study is made of: cells measured one by one, and how their values become a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from ..training.report import LABELS
from .config import StudyConfig

if TYPE_CHECKING:
    from ..training.loop import Recipe
    from .lab import Lab

# One measurement's coordinates, such as {"data": …, "net": …, "block": …, "seed": …}.
Cell = dict[str, "str | int"]


class Network(NamedTuple):
    """A trained network's coordinates: those that every cell has."""

    data: str
    net: str
    recipe: str  # in words
    backend: str
    block: str
    seed: int

    @classmethod
    def of(cls, cell: Cell) -> Network:
        """The network that the cell measures."""
        return cls(*(cell[name] for name in cls._fields))  # type: ignore[arg-type]


class Measured(NamedTuple):
    """A cell, what was measured there, and the command and machine that did it."""

    cell: Cell
    values: dict[str, Any]
    run: dict[str, Any] | None = None


class Table(NamedTuple):
    """A table of text: first column left, the others right."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def without_empty(self, *names: str) -> Table:
        """The table without those of the named columns in which no row has anything."""
        empty = {i for i, name in enumerate(self.header) if name in names and not any(row[i] for row in self.rows)}

        def kept(row: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(text for i, text in enumerate(row) if i not in empty)

        return Table(kept(self.header), [kept(row) for row in self.rows])


def flat(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """One CSV record a cell: its coordinates, then its values."""
    return [{**result.cell, **result.values} for result in results]


@dataclass(frozen=True)
class Study:
    """One of the paper's experiments.

    Attributes:
        name: on the command line, and of the files.
        title: of its section.
        paper: where the paper has it and what was found there.
        limits: what the numbers do and do not show.
        cells: what the configuration asks to measure; every cell has the coordinates of a `Network`.
        measure: the values of one cell.
        table, finding: of measured cells; finding is a sentence or two made from the numbers.
        plots: file name → what draws measured cells to a path.
        records: rows of the CSV file.
        compares_networks: table, finding and plots are of all cells; else of those that differ in no other
            coordinate of a network than block and seed, so that nothing else is averaged or compared.
    """

    name: str
    title: str
    paper: str
    limits: str
    cells: Callable[[StudyConfig], list[Cell]]
    measure: Callable[[Lab, Cell], dict[str, Any]]
    table: Callable[[Sequence[Measured]], Table]
    finding: Callable[[Sequence[Measured]], str]
    plots: Mapping[str, Callable[[Sequence[Measured], Path], None]]
    records: Callable[[Sequence[Measured]], list[dict[str, Any]]] = flat
    compares_networks: bool = False

    def groups(self, results: Sequence[Measured]) -> list[list[Measured]]:
        """The cells that belong into one table, by block and seed, however many shards measured them."""
        order = list(LABELS)
        results = sorted(results, key=lambda result: (order.index(str(result.cell["block"])), result.cell["seed"]))
        if self.compares_networks:
            return [results] if results else []
        found: dict[Network, list[Measured]] = {}
        for result in results:
            found.setdefault(Network.of(result.cell)._replace(block="", seed=0), []).append(result)
        return list(found.values())


def training_cells(config: StudyConfig, blocks: Iterable[str], recipe: Recipe | None = None) -> list[Cell]:
    """One cell a trained network of a recipe (the configuration's main one): every block with every seed."""
    recipe = recipe or config.recipe
    networks = [
        Network(recipe.data, recipe.net, config.words(recipe), recipe.backend, block, seed)
        for block in blocks
        for seed in range(config.seeds)
    ]
    return [network._asdict() for network in networks]


def by(results: Iterable[Measured], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    """Value of the key (a tuple for several) → the values measured there, in order of appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        at = tuple(result.cell[key] for key in keys)
        groups.setdefault(at if len(keys) > 1 else at[0], []).append(result.values)
    return groups


def subject(results: Sequence[Measured]) -> str:
    """'<network> on <data>' of results that are all of one."""
    cell = results[0].cell
    return f"{cell['net']} on {Path(str(cell['data'])).name}"


def setting(results: Sequence[Measured]) -> str:
    """Networks, data and training of measured cells in words."""
    found: dict[Network, tuple[dict[str, None], set[int]]] = {}
    for network in (Network.of(result.cell) for result in results):
        nets, seeds = found.setdefault(network._replace(net="", block="", seed=0), ({}, set()))
        nets[network.net] = None
        seeds.add(network.seed)
    parts = [
        f"{', '.join(nets)} on {Path(of.data).name}: {of.recipe}, backend {of.backend}, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        for of, (nets, seeds) in found.items()
    ]
    prunings = {result.cell["pruning"] for result in results if "pruning" in result.cell}
    return "; ".join(parts) + (f"; prunings a point: {len(prunings)}" if prunings else "")


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    """'mean ± std' of fractions in percent; without ± for one value."""
    middle, spread = mean_std([100 * value for value in values])
    return f"{middle:.2f} ± {spread:.2f}" if len(values) > 1 else f"{middle:.2f}"


class Difference(NamedTuple):
    """Of what was measured in pairs of networks that share their seed, and so their skeleton and batches.

    `error` is the standard error of the mean over `pairs`; None for a single pair, which has none.
    """

    mean: float
    error: float | None
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" if self.error is None else f"{self.mean:+.2f} ± {self.error:.2f}"

    @property
    def shown(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return self.error is not None and abs(self.mean) > 2 * self.error

    def verdict(self) -> str:
        """The difference, and whether it is one."""
        if self.error is None:
            return f"{self} in one pair of networks, which says nothing about chance"
        what = "beyond two standard errors" if self.shown else "inside two standard errors, so none is shown"
        return f"{self} ({self.pairs} seeds): {what}"


def difference(ours: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Ours − reference over the seeds (keys) that both have; None where they share none."""
    found = [ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())]
    if not found:
        return None
    error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Difference(mean(found), error, len(found))


def by_seed(results: Iterable[Measured], value: Callable[[dict[str, Any]], float]) -> dict[str, dict[int, float]]:
    """Block → seed → a value of one measurement a network."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        network = Network.of(result.cell)
        found.setdefault(network.block, {})[network.seed] = value(result.values)
    return found


def in_percent(name: str) -> Callable[[dict[str, Any]], float]:
    """What gets a measured fraction in percent."""
    return lambda values: 100 * values[name]


top1 = in_percent("top1")
