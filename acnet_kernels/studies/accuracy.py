"""Plain against ACNet, network by network (paper Tables 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.report import LABELS, parameters
from . import paper, plots
from .evaluate import accuracies
from .lab import Lab
from .plan import Plan
from .study import Cell, Measured, Study, Table, by, percent, points


def cells(plan: Plan) -> list[Cell]:
    return [
        {"data": recipe.data, "net": recipe.net, "block": block, "seed": seed}
        for recipe in plan.accuracy
        for block in ("plain", "acb")
        for seed in range(plan.seeds)
    ]


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    top1, top5 = accuracies(lab.folded(cell), lab.data(cell), top=(1, 5))
    return {"top1": top1, "top5": top5, "parameters_trained": parameters(lab.network(cell))}


def published(tables: dict[tuple[str, str], paper.Published], data: str, net: str) -> str:
    """'plain → ACNet' of one of `paper`'s tables; a directory of images counts as ImageNet; '' where unknown."""
    found = tables.get((data if data.startswith("cifar") else "imagenet", net))
    return f"{found.plain:.2f} → {found.acb:.2f}" if found else ""


def _column(values: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [v[name] for v in values]


def table(results: Sequence[Measured]) -> Table:
    header = (
        "network",
        "data",
        "seeds",
        "plain top-1 (%)",
        "ACNet top-1 (%)",
        "gain (points)",
        "plain top-5 (%)",
        "ACNet top-5 (%)",
        "paper",
        "authors' code",
    )
    rows: list[tuple[str, ...]] = []
    for (data, net), blocks in _complete(results).items():
        plain, acb = blocks
        top1 = _column(plain, "top1"), _column(acb, "top1")
        rows.append(
            (
                net,
                Path(data).name,
                str(len(plain)),
                percent(top1[0]),
                percent(top1[1]),
                points(top1[1], top1[0]),
                percent(_column(plain, "top5")),
                percent(_column(acb, "top5")),
                published(paper.TABLES, data, net),
                published(paper.AUTHORS_CODE, data, net),
            )
        )
    return Table(header, rows)


def _complete(results: Sequence[Measured]) -> dict[tuple[str, str], tuple[list, list]]:
    """(data, net) → the values of plain and of acb, where both have been measured equally often."""
    groups = by(results, "data", "net", "block")
    pairs = {
        (data, net): (groups.get((data, net, "plain"), []), groups.get((data, net, "acb"), []))
        for data, net, _ in groups
    }
    return {at: pair for at, pair in pairs.items() if len(pair[0]) == len(pair[1])}


def finding(results: Sequence[Measured]) -> str:
    complete = _complete(results)
    better = [
        net
        for (_, net), (plain, acb) in complete.items()
        if sum(_column(acb, "top1")) > sum(_column(plain, "top1"))
    ]
    return f"The ACNet's mean is above the plain network's for {len(better)} of {len(complete)} networks."


def plot(results: Sequence[Measured], path: Path) -> None:
    panels: dict[str, dict[str, list[float]]] = {}
    for (data, net, block), values in by(results, "data", "net", "block").items():
        panels.setdefault(f"{net}, {Path(data).name} (%)", {})[LABELS[block]] = _column(values, "top1")
    plots.dots(panels, "test accuracy", path)


STUDY = Study(
    name="accuracy",
    title="Accuracy, plain and ACNet",
    paper=(
        "Tables 1 to 3: the ACNet was more accurate than the plain network with every architecture on CIFAR-10, "
        "CIFAR-100 and ImageNet."
    ),
    limits=(
        "Accuracy of the folded network after the last epoch, never the best one; ± is over seeds. The paper's and "
        "the authors' figures are for their own data and long schedules and stand beside ours only where data and "
        "network are the same. Its plain Cifar-quick and VGG had no batch norm (the authors' code says it added "
        "it); ours have."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"accuracy.png": plot},
)
