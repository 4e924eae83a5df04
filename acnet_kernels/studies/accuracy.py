"""Plain against ACNet, network by network (paper Tables 1 to 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.report import LABELS, parameters
from . import paper, plots
from .evaluate import accuracies
from .lab import Lab
from .plan import Plan
from .study import Cell, Measured, Network, Study, Table, percent, points, training_cells


def cells(plan: Plan) -> list[Cell]:
    return [cell for recipe in plan.accuracy for cell in training_cells(plan, ("plain", "acb"), recipe)]


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
        "training",
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
    for of, (plain, acb) in _complete(results).items():
        top1 = _column(plain, "top1"), _column(acb, "top1")
        rows.append(
            (
                of.net,
                Path(of.data).name,
                of.recipe if of.backend == "auto" else f"{of.recipe}, backend {of.backend}",
                str(len(plain)),
                percent(top1[0]),
                percent(top1[1]),
                points(top1[1], top1[0]),
                percent(_column(plain, "top5")),
                percent(_column(acb, "top5")),
                published(paper.TABLES, of.data, of.net),
                published(paper.AUTHORS_CODE, of.data, of.net),
            )
        )
    return Table(header, rows)


def _complete(results: Sequence[Measured]) -> dict[Network, tuple[list, list]]:
    """Network without block and seed → the values of plain and of acb, where both were measured equally often."""
    pairs: dict[Network, tuple[list, list]] = {}
    for result in results:
        network = Network.of(result.cell)
        pair = pairs.setdefault(network._replace(block="", seed=0), ([], []))
        pair[network.block == "acb"].append(result.values)
    return {at: pair for at, pair in pairs.items() if len(pair[0]) == len(pair[1])}


def finding(results: Sequence[Measured]) -> str:
    complete = _complete(results)
    better = sum(sum(_column(acb, "top1")) > sum(_column(plain, "top1")) for plain, acb in complete.values())
    return f"The ACNet's mean is above the plain network's for {better} of {len(complete)} networks."


def plot(results: Sequence[Measured], path: Path) -> None:
    panels: dict[str, dict[str, list[float]]] = {}
    names = Counter((of.net, of.data) for of in {Network.of(r.cell)._replace(block="", seed=0) for r in results})
    for result in results:
        of = Network.of(result.cell)
        # Networks that differ in their training alone are told apart by it.
        trained = f"\n{of.recipe}, {of.backend}" if names[of.net, of.data] > 1 else ""
        panel = panels.setdefault(f"{of.net}, {Path(of.data).name}{trained} (%)", {})
        panel.setdefault(LABELS[of.block], []).append(result.values["top1"])
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
    compares_networks=True,
)
