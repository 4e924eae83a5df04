"""Which added branches and which place of the batch norm matter (paper Table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..training.report import LABELS, parameters
from . import evaluate, paper, plots
from .config import StudyConfig
from .lab import Lab
from .study import (
    Cell,
    Measured,
    Study,
    Table,
    by,
    by_seed,
    difference,
    percent,
    subject,
    top1,
    training_cells,
)

# Block → (horizontal, vertical, batch norm in the branches), the columns of Table 4.
ROWS = {
    "plain": ("", "", ""),
    "acb-hor": ("✓", "", "✓"),
    "acb-ver": ("", "✓", "✓"),
    "acb-sum": ("✓", "✓", ""),
    "acb": ("✓", "✓", "✓"),
}


def cells(config: StudyConfig) -> list[Cell]:
    return training_cells(config, ROWS)


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    return {
        **evaluate.measure(lab, cell),
        "parameters_trained": parameters(lab.network(cell)),
        "parameters_folded": parameters(lab.folded(cell)),
    }


def table(results: Sequence[Measured]) -> Table:
    groups, measured = by(results, "block"), by_seed(results, top1)
    header = (
        "",
        "hor",
        "ver",
        "BN in branch",
        "seeds",
        "top-1 (%)",
        "over plain (points, ± standard error)",
        "parameters",
        "paper",
    )
    rows: list[tuple[str, ...]] = []
    for block, marks in ROWS.items():
        if block in groups:
            values = groups[block]
            gain = difference(measured[block], measured.get("plain", {})) if block != "plain" else None
            accuracy, count = percent([v["top1"] for v in values]), f"{values[0]['parameters_trained']:,}"
            seeds, gained = str(len(values)), str(gain or "")
            published = (paper.find(paper.ABLATION, results) or {}).get(block, "")
            rows.append((LABELS[block], *marks, seeds, accuracy, gained, count, published))
    return Table(header, rows).without_empty("paper")


def finding(results: Sequence[Measured]) -> str:
    measured = by_seed(results, top1)
    gain = difference(measured.get("acb", {}), measured.get("plain", {}))
    if gain is None:
        return ""
    best = max(measured, key=lambda block: mean(measured[block].values()))
    return f"ACNet over plain, in points: {gain.verdict()}. The best mean is that of: {LABELS[best]}."


def plot(results: Sequence[Measured], path: Path) -> None:
    groups = by(results, "block")
    values = {LABELS[block]: [v["top1"] for v in groups[block]] for block in ROWS if block in groups}
    plots.dots({"test accuracy (%)": values}, f"ablation, {subject(results)}", path)


STUDY = Study(
    name="ablation",
    title="Ablation of the branches",
    paper=(
        "Table 4, ImageNet: AlexNet 55.92 % plain, 57.44 % with both branches, 56.18 % with one batch norm after "
        "the sum; ResNet-18 70.36, 71.14 and 70.82 %. Each branch alone helped, too."
    ),
    limits=(
        "Networks that differ only in the block, started from the same square kernels and fed the same batches; ± "
        "is the standard deviation over seeds, in the column of gains the standard error of the mean paired "
        "difference. A gain inside two standard errors is none shown; with few seeds one outside may be chance, "
        "too. A small network trained briefly shows whether the branches train and fold as they should; no ranking "
        "here carries over to ImageNet."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"ablation.png": plot},
)
