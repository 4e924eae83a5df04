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
from .study import Cell, Difference, Measured, Study, Table, by, by_seed, difference, in_percent, percent, subject


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
    sentences = [_gains(results, "acb", "plain"), _gains(results, "acb-hor", "acb-ver")]
    differ = max(abs(r.values[name] - r.values[f"{name}, unfolded"]) for r in results for name in ORIENTATIONS)
    folding = "no accuracy" if differ == 0 else f"accuracies by up to {100 * differ:.2f} points"
    return " ".join([*filter(None, sentences), f"Folding changed {folding}."])


def _gains(results: Sequence[Measured], ours: str, reference: str) -> str:
    """The paired differences of two blocks on every test set, and which are shown; '' where none can be paired."""
    found: dict[str, Difference] = {}
    for name in ORIENTATIONS:
        values = by_seed(results, in_percent(name))
        gain = difference(values.get(ours, {}), values.get(reference, {}))
        if gain is not None:
            found[name] = gain
    if not found:
        return ""
    shown = ", ".join(name for name, gain in found.items() if gain.shown) or "none"
    listed = ", ".join(f"{name} {gain}" for name, gain in found.items())
    of = f"{LABELS[ours]} over {LABELS[reference]}, in points (seeds: {next(iter(found.values())).pairs})"
    return f"{of}: {listed}; beyond two standard errors: {shown}."


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
        "ACNets were more accurate than plain networks on the original, rotated and flipped validation images. The "
        "gains that its text states there are +0.34 and +1.27 points, and +0.75."
    ),
    limits=(
        "The ablation's networks, evaluated before folding (branch by branch) and after. Training images are never "
        "turned, so all figures but the first are far below it. Turning changes some classes into others or into "
        "nothing (a 6 into a 9, a shoe onto its toe), which no network can undo. ± is the standard deviation over "
        "seeds, of gains the standard error of the mean paired difference."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"rotation.png": plot},
)
