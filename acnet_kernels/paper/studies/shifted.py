"""Whether it matters that the branches strengthen the skeleton and not the border (paper §4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..training.report import LABELS
from . import paper, plots
from .config import StudyConfig
from .evaluate import measure
from .pruning import STUDIED
from .study import Cell, Measured, Study, Table, by, by_seed, difference, percent, subject, top1, training_cells


def cells(config: StudyConfig) -> list[Cell]:
    return training_cells(config, STUDIED)


def table(results: Sequence[Measured]) -> Table:
    measured = by_seed(results, top1)
    rows: list[tuple[str, ...]] = []
    for block, values in by(results, "block").items():
        gain = difference(measured[block], measured.get("plain", {})) if block != "plain" else None
        accuracy = percent([v["top1"] for v in values])
        published = (paper.find(paper.SHIFTED, results) or {}).get(block, "")
        rows.append((LABELS[block], str(len(values)), accuracy, str(gain or ""), published))
    gained = "over plain (points, ± standard error)"
    return Table(("", "seeds", "top-1 (%)", gained, "paper"), rows).without_empty("paper")


def finding(results: Sequence[Measured]) -> str:
    measured = by_seed(results, top1)
    found = difference(measured.get("acb-border", {}), measured.get("acb", {}))
    return f"Border-shifted over ACNet, in points: {found.verdict()}." if found else ""


def plot(results: Sequence[Measured], path: Path) -> None:
    values = {LABELS[block]: [v["top1"] for v in values] for block, values in by(results, "block").items()}
    plots.dots({"test accuracy (%)": values}, f"skeleton or border, {subject(results)}", path)


STUDY = Study(
    name="shifted",
    title="Skeleton or border",
    paper=(
        "§4.4, ResNet-56 on CIFAR-10: 94.31 % plain, 95.09 % as ACNet, 94.67 % with the horizontal branch one row "
        "down and the vertical one column right, so that they strengthen the border."
    ),
    limits=(
        "The three networks have the same skeleton, seeds and batches; ± is the standard deviation over seeds, of "
        "gains the standard error of the mean paired difference. On a small, easy set the three lie closer than in "
        "the paper, and an order inside two standard errors is no order."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"shifted.png": plot},
)
