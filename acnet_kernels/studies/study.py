"""What every study is made of: cells measured one by one, and how their values become a table and a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from .plan import Plan

if TYPE_CHECKING:
    from .lab import Lab

# One measurement's coordinates, such as {"data": …, "net": …, "block": …, "seed": …}.
Cell = dict[str, "str | int"]


class Measured(NamedTuple):
    """A cell and what was measured there."""

    cell: Cell
    values: dict[str, Any]


class Table(NamedTuple):
    """A table of text: first column left, the others right."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


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
        cells: what the plan asks to measure; every cell has data, net, block and seed.
        measure: the values of one cell.
        table, finding: of the measured cells; finding is a sentence or two made from the numbers.
        plots: file name → what draws the measured cells to a path.
        records: rows of the CSV file.
    """

    name: str
    title: str
    paper: str
    limits: str
    cells: Callable[[Plan], list[Cell]]
    measure: Callable[[Lab, Cell], dict[str, Any]]
    table: Callable[[Sequence[Measured]], Table]
    finding: Callable[[Sequence[Measured]], str]
    plots: Mapping[str, Callable[[Sequence[Measured], Path], None]]
    records: Callable[[Sequence[Measured]], list[dict[str, Any]]] = flat


def training_cells(plan: Plan, blocks: Iterable[str]) -> list[Cell]:
    """One cell a trained network of the plan's recipe: every block with every seed."""
    recipe = plan.recipe
    return [
        {"data": recipe.data, "net": recipe.net, "block": block, "seed": seed}
        for block in blocks
        for seed in range(plan.seeds)
    ]


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


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    """'mean ± std' of fractions in percent; without ± for one value."""
    middle, spread = mean_std([100 * value for value in values])
    return f"{middle:.2f} ± {spread:.2f}" if len(values) > 1 else f"{middle:.2f}"


def points(ours: Sequence[float], reference: Sequence[float]) -> str:
    """The difference of two lists of fractions (same seeds, in order) in percentage points: 'mean ± std'."""
    middle, spread = mean_std([100 * (a - b) for a, b in zip(ours, reference, strict=True)])
    return f"{middle:+.2f} ± {spread:.2f}" if len(ours) > 1 else f"{middle:+.2f}"
