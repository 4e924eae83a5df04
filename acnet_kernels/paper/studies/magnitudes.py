"""How large the folded kernels are at each position (paper Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..models.blocks import VARIANTS
from ..training.report import LABELS, kernel_magnitudes, mean_magnitude, plot_kernels
from . import plots
from .config import StudyConfig
from .lab import Lab
from .pruning import STUDIED
from .regions import regions
from .study import (
    Cell,
    Measured,
    Study,
    Table,
    by,
    by_seed,
    difference,
    mean_std,
    subject,
    training_cells,
)

# State of a network → the name of its A among the values.
STATES = {"untrained": "untrained mean", "trained": "mean"}
PARTS = ("corners", "skeleton", "top left", "border")
# Block → the region whose magnitudes over which other's tell what its branches do.
RATIOS = {
    "plain": ("skeleton", "corners"),
    "acb": ("skeleton", "corners"),
    "acb-border": ("border", "top left"),
}


def cells(config: StudyConfig) -> list[Cell]:
    return training_cells(config, STUDIED)


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    layers = kernel_magnitudes(lab.folded(cell))
    return {
        "mean": mean_magnitude(layers).tolist(),
        "untrained mean": mean_magnitude(kernel_magnitudes(lab.untrained(cell))).tolist(),
        "layers": {name: matrix.tolist() for name, matrix in layers.items()},
    }


def theory(block: str, kernel: int) -> Tensor:
    """A before training, from standard deviations: k×k, float64, its maximum 1.

    A branch's weights are drawn alike, and its batch norm scales its output, a sum over its taps, to variance 1:
    so a folded weight's variance is the sum over its branches of 1 / taps.
    """
    variance = torch.full((kernel, kernel), 1 / kernel**2, dtype=torch.float64)
    if block != "plain":
        row, column = (kernel // 2 + shift for shift in VARIANTS[block](kernel).get("shift", (0, 0)))
        variance[row] += 1 / kernel
        variance[:, column] += 1 / kernel
    return (variance / variance.max()).sqrt()


def mean_matrices(results: Sequence[Measured], state: str) -> dict[str, Tensor]:
    """Block → the matrix A, averaged over its networks in this state."""
    return {
        block: torch.tensor([v[STATES[state]] for v in values], dtype=torch.float64).mean(0)
        for block, values in by(results, "block").items()
    }


def region_mean(matrix: Tensor, region: str) -> float:
    """The mean of a k×k matrix over one of its `regions`."""
    positions = regions(len(matrix))[region]
    return sum(float(matrix[position]) for position in positions) / len(positions)


def ratio(matrix: Tensor, block: str) -> float:
    """The mean over the region that the block's branches strengthen (the skeleton, for plain), over the other's."""
    strengthened, spared = RATIOS[block]
    return region_mean(matrix, strengthened) / region_mean(matrix, spared)


def ratios(results: Sequence[Measured], block: str, state: str) -> dict[int, float]:
    """Seed → the `ratio` of its network in this state."""
    found = by_seed(results, lambda v: ratio(torch.tensor(v[STATES[state]], dtype=torch.float64), block))
    return found.get(block, {})


def table(results: Sequence[Measured]) -> Table:
    rows: list[tuple[str, ...]] = []

    def add(label: str, seeds: str, matrix: Tensor, of: str) -> None:
        rows.append((label, seeds, *(f"{region_mean(matrix, part):.3f}" for part in PARTS), of))

    for block, trained in mean_matrices(results, "trained").items():
        of = " / ".join(RATIOS[block])
        expected = theory(block, len(trained))
        add(f"{LABELS[block]}, untrained, in theory", "", expected, f"{of} {ratio(expected, block):.2f}")
        for state in STATES:
            middle, spread = mean_std(list(ratios(results, block, state).values()))
            label = LABELS[block] if state == "trained" else f"{LABELS[block]}, {state}"
            seeds = len(ratios(results, block, state))
            text = f"{of} {middle:.2f}" + (f" ± {spread:.2f}" if seeds > 1 else "")
            add(label, str(seeds), mean_matrices(results, state)[block], text)
    return Table(("mean of A over", "seeds", *PARTS, "ratio"), rows)


def finding(results: Sequence[Measured]) -> str:
    sentences = []
    for block in by(results, "block"):
        before, after = (ratios(results, block, state) for state in STATES)
        added = difference(after, before)
        assert added is not None  # every network is measured in both states
        sentences.append(
            f"{LABELS[block]}, {' over '.join(RATIOS[block])}: {mean(before.values()):.2f} untrained, "
            f"{mean(after.values()):.2f} trained; training adds {added.verdict()}."
        )
    return " ".join(sentences)


def plot(results: Sequence[Measured], path: Path) -> None:
    _plot(results, "trained", path)


def plot_untrained(results: Sequence[Measured], path: Path) -> None:
    """The same of the networks before training."""
    _plot(results, "untrained", path)


def _plot(results: Sequence[Measured], state: str, path: Path) -> None:
    matrices = {LABELS[block]: matrix for block, matrix in mean_matrices(results, state).items()}
    plot_kernels(matrices, f"kernel magnitude A, {subject(results)}, {state}", path)


def plot_layers(results: Sequence[Measured], path: Path) -> None:
    """The trained networks layer by layer, each averaged over them."""
    panels = {}
    for block, values in by(results, "block").items():
        layers = {
            name: torch.tensor([v["layers"][name] for v in values], dtype=torch.float64).mean(0)
            for name in values[0]["layers"]
        }
        panels[LABELS[block]] = layers
    plots.layers(panels, f"max-normalised Σ|F| of every layer, {subject(results)}", path)


def records(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """One record a network and layer ('mean' for A, 'untrained mean'), its k² values named by row and column."""
    return [
        {**cell, "layer": layer, **{f"{r}{c}": v for r, row in enumerate(matrix) for c, v in enumerate(row)}}
        for cell, values, _ in results
        for layer, matrix in {**{name: values[name] for name in STATES.values()}, **values["layers"]}.items()
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
        "each layer's maximum scaled to 1. An untrained ACNet is no flat one: its branches lie on the skeleton "
        "from the start, and batch norm gives each as large an output as the k×k kernel's. So the untrained rows, "
        "the same networks before their first step, folded by the training images' statistics, are the control, "
        "and what training adds is the finding. A says where weights are large, not what they are worth: the "
        "pruning study asks that."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={
        "magnitudes.png": plot,
        "magnitudes-untrained.png": plot_untrained,
        "magnitudes-layers.png": plot_layers,
    },
    records=records,
)
