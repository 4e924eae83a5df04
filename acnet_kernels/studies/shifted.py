"""Whether it matters that the branches strengthen the skeleton and not the border (paper §4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.report import LABELS
from . import plots
from .evaluate import accuracies
from .lab import Lab
from .paper import BORDER_RESNET56, TABLES
from .plan import Plan
from .pruning import STUDIED
from .study import Cell, Measured, Study, Table, by, percent, points, subject, training_cells

_RESNET56 = TABLES["cifar10", "resnet56"]
PAPER = {"plain": _RESNET56.plain, "acb": _RESNET56.acb, "acb-border": BORDER_RESNET56}


def cells(plan: Plan) -> list[Cell]:
    return training_cells(plan, STUDIED)


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    top1, top5 = accuracies(lab.folded(cell), lab.data(cell), top=(1, 5))
    return {"top1": top1, "top5": top5}


def _groups(results: Sequence[Measured]) -> dict[str, list[float]]:
    return {block: [v["top1"] for v in values] for block, values in by(results, "block").items()}


def table(results: Sequence[Measured]) -> Table:
    groups = _groups(results)
    rows: list[tuple[str, ...]] = []
    for block, top1 in groups.items():
        paired = block != "plain" and len(groups.get("plain", ())) == len(top1)
        gain = points(top1, groups["plain"]) if paired else ""
        rows.append((LABELS[block], str(len(top1)), percent(top1), gain, f"{PAPER[block]:.2f}"))
    return Table(("", "seeds", "top-1 (%)", "over plain (points)", "paper: ResNet-56, CIFAR-10"), rows)


def finding(results: Sequence[Measured]) -> str:
    groups = _groups(results)
    if len(groups) < len(STUDIED) or len({len(top1) for top1 in groups.values()}) > 1:
        return ""
    return f"Border-shifted is {points(groups['acb-border'], groups['acb'])} points from ACNet."


def plot(results: Sequence[Measured], path: Path) -> None:
    values = {LABELS[block]: top1 for block, top1 in _groups(results).items()}
    plots.dots({"test accuracy (%)": values}, f"skeleton or border, {subject(results)}", path)


STUDY = Study(
    name="shifted",
    title="Skeleton or border",
    paper=(
        "§4.4, ResNet-56 on CIFAR-10: 94.31 % plain, 95.09 % as ACNet, 94.67 % with the horizontal branch one row "
        "down and the vertical one column right, so that they strengthen the border."
    ),
    limits=(
        "The three networks have the same skeleton, seeds and batches; ± is over seeds. On a small, easy set the "
        "three lie closer than in the paper, and an order inside ± is no order."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"shifted.png": plot},
)
