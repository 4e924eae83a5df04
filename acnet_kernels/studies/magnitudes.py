"""How large the folded kernels are at each position (paper Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.report import LABELS, kernel_magnitudes, mean_magnitude, plot_kernels
from . import plots
from .lab import Lab
from .plan import Plan
from .pruning import STUDIED
from .regions import regions
from .study import Cell, Measured, Study, Table, by, subject, training_cells


def cells(plan: Plan) -> list[Cell]:
    return training_cells(plan, STUDIED)


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    layers = kernel_magnitudes(lab.folded(cell))
    return {
        "mean": mean_magnitude(layers).tolist(),
        "layers": {name: matrix.tolist() for name, matrix in layers.items()},
    }


def mean_matrices(results: Sequence[Measured]) -> dict[str, Tensor]:
    """Block → the matrix A, averaged over the trained networks."""
    return {
        block: torch.tensor([v["mean"] for v in values], dtype=torch.float64).mean(0)
        for block, values in by(results, "block").items()
    }


def region_mean(matrix: Tensor, region: str) -> float:
    """The mean of a k×k matrix over one of its `regions`."""
    positions = regions(len(matrix))[region]
    return sum(float(matrix[position]) for position in positions) / len(positions)


def table(results: Sequence[Measured]) -> Table:
    parts = ("corners", "skeleton", "top left", "border")
    seeds = {block: len(values) for block, values in by(results, "block").items()}
    rows = [
        (LABELS[block], str(seeds[block]), *(f"{region_mean(matrix, region):.3f}" for region in parts))
        for block, matrix in mean_matrices(results).items()
    ]
    return Table(("mean of A over", "seeds", *parts), rows)


def finding(results: Sequence[Measured]) -> str:
    ratios = {
        block: region_mean(matrix, "skeleton") / region_mean(matrix, "corners")
        for block, matrix in mean_matrices(results).items()
    }
    if not ratios:
        return ""
    return "Skeleton over corners: " + ", ".join(f"{LABELS[b]} {ratio:.2f}" for b, ratio in ratios.items()) + "."


def plot(results: Sequence[Measured], path: Path) -> None:
    matrices = {LABELS[block]: matrix for block, matrix in mean_matrices(results).items()}
    plot_kernels(matrices, f"kernel magnitude A, {subject(results)}", path)


def plot_layers(results: Sequence[Measured], path: Path) -> None:
    """The same layer by layer, each averaged over the trained networks."""
    panels = {}
    for block, values in by(results, "block").items():
        layers = {
            name: torch.tensor([v["layers"][name] for v in values], dtype=torch.float64).mean(0)
            for name in values[0]["layers"]
        }
        panels[LABELS[block]] = layers
    plots.layers(panels, f"max-normalised Σ|F| of every layer, {subject(results)}", path)


def records(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """One record a network and layer ('mean' for A), its k² values named by row and column."""
    return [
        {**cell, "layer": layer, **{f"{r}{c}": v for r, row in enumerate(matrix) for c, v in enumerate(row)}}
        for cell, values, _ in results
        for layer, matrix in {"mean": values["mean"], **values["layers"]}.items()
    ]


STUDY = Study(
    name="magnitudes",
    title="Kernel magnitudes",
    paper=(
        "Fig. 6, ResNet-56 on CIFAR-10: the plain network's kernels are larger on the skeleton than in the corners "
        "already, and the ACNet's more so; beside them the border-shifted network."
    ),
    limits=(
        "A is the mean over all layers of the network's commonest kernel size of Σ|F| over filters and channels, "
        "each layer's maximum scaled to 1. It says where weights are large, not what they are worth: the pruning "
        "study asks that."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"magnitudes.png": plot, "magnitudes-layers.png": plot_layers},
    records=records,
)
