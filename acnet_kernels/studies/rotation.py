"""Accuracy on turned test images, which the training images never are (paper Fig. 4 and Table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.folding import branchwise
from ..training.report import LABELS
from . import plots
from .ablation import ROWS, cells
from .evaluate import ORIENTATIONS, accuracies
from .lab import Lab
from .study import Cell, Measured, Study, Table, by, percent, subject


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    folded, unfolded, data = lab.folded(cell), branchwise(lab.network(cell)), lab.data(cell)
    values = {}
    for name, turn in ORIENTATIONS.items():
        values[name] = accuracies(folded, data, turn=turn)[0]
        values[f"{name}, unfolded"] = accuracies(unfolded, data, turn=turn)[0]
    return values


def table(results: Sequence[Measured]) -> Table:
    groups = by(results, "block")
    rows = []
    for block in (block for block in ROWS if block in groups):
        columns = [percent([v[name] for v in groups[block]]) for name in ORIENTATIONS]
        differ = max(abs(v[name] - v[f"{name}, unfolded"]) for v in groups[block] for name in ORIENTATIONS)
        rows.append((LABELS[block], str(len(groups[block])), *columns, f"{100 * differ:.2f}"))
    return Table(("top-1 (%)", "seeds", *ORIENTATIONS, "largest change by folding (points)"), rows)


def finding(results: Sequence[Measured]) -> str:
    groups = by(results, "block")
    if not {"plain", "acb"} <= set(groups):
        return ""
    turned = [name for name in ORIENTATIONS if name != "original"]
    means = {
        block: sum(v[name] for v in groups[block] for name in turned) / len(groups[block]) / len(turned)
        for block in groups
    }
    differ = max(abs(r.values[name] - r.values[f"{name}, unfolded"]) for r in results for name in ORIENTATIONS)
    return (
        f"Mean over the three turned sets: plain {100 * means['plain']:.2f} %, ACNet {100 * means['acb']:.2f} %. "
        f"Folding changed {'no accuracy' if differ == 0 else f'accuracies by up to {100 * differ:.2f} points'}."
    )


def plot(results: Sequence[Measured], path: Path) -> None:
    groups = by(results, "block")
    panels = {
        f"{name} (%)": {LABELS[block]: [v[name] for v in groups[block]] for block in ROWS if block in groups}
        for name in ORIENTATIONS
    }
    plots.dots(panels, f"accuracy on turned test images, {subject(results)}", path)


STUDY = Study(
    name="rotation",
    title="Robustness to rotation",
    paper=(
        "Fig. 4 and the right columns of Table 4, on ImageNet: horizontal kernels survive an up-down flip, and "
        "ACNets were more accurate than plain networks on the original, rotated and flipped validation images."
    ),
    limits=(
        "The ablation's networks, evaluated before folding (branch by branch) and after. Training images are never "
        "turned, so all figures but the first are far below it. Turning changes some classes into others or into "
        "nothing (a 6 into a 9, a shoe onto its toe), which no network can undo; gaps within ± are noise."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"rotation.png": plot},
)
