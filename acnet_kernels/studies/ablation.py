"""Which added branches and which place of the batch norm matter (paper Table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.report import LABELS, parameters
from . import plots
from .evaluate import accuracies
from .lab import Lab
from .paper import TABLES
from .plan import Plan
from .study import Cell, Measured, Study, Table, by, percent, points, subject, training_cells

# Block → (horizontal, vertical, batch norm in the branches), the columns of Table 4.
ROWS = {
    "plain": ("", "", ""),
    "acb-hor": ("✓", "", "✓"),
    "acb-ver": ("", "✓", "✓"),
    "acb-sum": ("✓", "✓", ""),
    "acb": ("✓", "✓", "✓"),
}
# Table 4's first and last row; its others are in the paper alone.
PAPER_HEAD = "paper: AlexNet, ResNet-18 (ImageNet)"
_ALEXNET, _RESNET18 = TABLES["imagenet", "alexnet-bn"], TABLES["imagenet", "resnet18"]
PAPER = {
    "plain": f"{_ALEXNET.plain:.2f}, {_RESNET18.plain:.2f}",
    "acb": f"{_ALEXNET.acb:.2f}, {_RESNET18.acb:.2f}",
}


def cells(plan: Plan) -> list[Cell]:
    return training_cells(plan, ROWS)


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    top1, top5 = accuracies(lab.folded(cell), lab.data(cell), top=(1, 5))
    return {
        "top1": top1,
        "top5": top5,
        "parameters_trained": parameters(lab.network(cell)),
        "parameters_folded": parameters(lab.folded(cell)),
    }


def table(results: Sequence[Measured]) -> Table:
    groups = by(results, "block")
    header = (
        "",
        "hor",
        "ver",
        "BN in branch",
        "seeds",
        "top-1 (%)",
        "over plain (points)",
        "parameters",
        PAPER_HEAD,
    )
    rows: list[tuple[str, ...]] = []
    for block, marks in ROWS.items():
        if block in groups:
            values = groups[block]
            top1 = [v["top1"] for v in values]
            paired = block != "plain" and len(groups.get("plain", ())) == len(top1)
            gain = points(top1, [v["top1"] for v in groups["plain"]]) if paired else ""
            count = f"{values[0]['parameters_trained']:,}"
            row = (LABELS[block], *marks, str(len(top1)), percent(top1), gain, count, PAPER.get(block, ""))
            rows.append(row)
    return Table(header, rows)


def finding(results: Sequence[Measured]) -> str:
    groups = {block: [v["top1"] for v in values] for block, values in by(results, "block").items()}
    if not {"plain", "acb"} <= set(groups) or len(groups["plain"]) != len(groups["acb"]):
        return ""
    gain = points(groups["acb"], groups["plain"])
    best = max(groups, key=lambda block: sum(groups[block]) / len(groups[block]))
    return f"ACNet is {gain} points from plain over {len(groups['acb'])} seeds; the best mean is {LABELS[best]}'s."


def plot(results: Sequence[Measured], path: Path) -> None:
    groups = by(results, "block")
    values = {LABELS[block]: [v["top1"] for v in groups[block]] for block in ROWS if block in groups}
    plots.dots({"test accuracy (%)": values}, f"ablation, {subject(results)}", path)


STUDY = Study(
    name="ablation",
    title="Ablation of the branches",
    paper=(
        "Table 4, AlexNet and ResNet-18 on ImageNet. Each branch alone helped, both together helped most, and one "
        "batch norm after the sum gained less than one a branch."
    ),
    limits=(
        "Networks that differ only in the block, started from the same square kernels and fed the same batches; "
        "± is the standard deviation over seeds, of the paired difference in the column of gains. A small network "
        "trained briefly on an easy set shows whether the branches train and fold as they should; differences "
        "smaller than their ± say nothing, and no ranking here carries over to ImageNet."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"ablation.png": plot},
)
