"""The studies' figures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.report import COLOURS, new_figure
from .study import mean_std

# What the rows of `layers` are called for a 3×3 kernel; those of larger ones are numbered.
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

Curve = Mapping[Fraction, Sequence[float]]


def dots(panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: Path) -> None:
    """One row a label: a circle for every seed, a bar from mean − std to mean + std; the first row's mean dashed.

    Args:
        panels: name of the horizontal axis → label → fractions, drawn as percent.
        title: over all panels.
        path: the PNG to write.
    """
    rows = max(len(groups) for groups in panels.values())
    figure, axes = new_figure(len(panels), width=max(6.0, 2.5 * len(panels) + 1.6), height=0.38 * rows + 1.3)
    for number, (axis, (name, groups)) in enumerate(zip(axes, panels.items(), strict=True)):
        for row, values in enumerate(groups.values()):
            in_percent = [100 * value for value in values]
            middle, spread = mean_std(in_percent)
            colour = COLOURS[0] if row == 0 else COLOURS[1]
            axis.errorbar(middle, row, xerr=spread, fmt="o", color=colour, markersize=6, capsize=3, zorder=3)
            axis.scatter(in_percent, [row] * len(values), s=16, facecolor="white", edgecolor=colour, zorder=4)
            if row == 0:
                axis.axvline(middle, color="0.7", linestyle="--", linewidth=1, zorder=1)
        axis.set(xlabel=name, ylim=(rows - 0.5, -0.5))
        same = number > 0 and list(groups) == list(next(iter(panels.values())))
        axis.set_yticks(range(len(groups)), [""] * len(groups) if same else list(groups))
        axis.xaxis.get_major_locator().set_params(nbins=4)
        _clean(axis, "x")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def curves(panels: Mapping[str, Mapping[str, Curve]], title: str, path: Path, mark: Fraction, layers: str) -> None:
    """Accuracy over sparsity, mean with a band of ± std, one colour a label, on common axes.

    Args:
        panels: title of the panel → label → sparsity → fractions.
        title: over all panels.
        path: the PNG to write.
        mark: a sparsity to mark in every panel.
        layers: which are pruned, as '3×3'.
    """
    labels = dict.fromkeys(label for labelled in panels.values() for label in labelled)
    colours = dict(zip(labels, (*COLOURS, "#E69F00"), strict=False))
    figure, axes = new_figure(len(panels), width=3.5 * len(panels) + 0.6, height=3.7)
    for axis, (name, labelled) in zip(axes, panels.items(), strict=True):
        for label, curve in labelled.items():
            colour = colours[label]
            at = [100 * float(sparsity) for sparsity in curve]
            spreads = [mean_std([100 * value for value in values]) for values in curve.values()]
            axis.plot(at, [middle for middle, _ in spreads], color=colour, marker="o", markersize=3, label=label)
            low, high = [m - s for m, s in spreads], [m + s for m, s in spreads]
            axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.axvline(100 * float(mark), color="0.7", linestyle="--", linewidth=1, zorder=1)
        axis.text(100 * float(mark) - 0.5, 99, str(mark), color="0.45", ha="right", va="top", fontsize=8)
        axis.set(xlabel=f"zeros (% of all {layers} weights) in:", ylim=(0, 101))
        axis.set_title(name, fontsize=10)
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=8.5)
        _clean(axis, "both")
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def layers(panels: Mapping[str, Mapping[str, Tensor]], title: str, path: Path) -> None:
    """A heat map of position × layer for every panel, on one colour scale from 0 to 1.

    Args:
        panels: title of the panel → layer's name → k×k matrix, of one k.
        title: over all panels.
        path: the PNG to write.
    """
    depth = max(len(matrices) for matrices in panels.values())
    kernel = len(next(iter(next(iter(panels.values())).values())))
    numbered = [f"row {row + 1}, column {column + 1}" for row in range(kernel) for column in range(kernel)]
    positions = POSITIONS if kernel == 3 else numbered
    size = {"width": len(panels) * (0.3 * min(max(depth, 6), 20) + 1.2) + 1.6, "height": 2.1 + 0.15 * kernel**2}
    figure, axes = new_figure(len(panels), **size)
    image: Any = None
    for number, (axis, (name, matrices)) in enumerate(zip(axes, panels.items(), strict=True)):
        grid = torch.stack([matrix.flatten() for matrix in matrices.values()], 1)
        image = axis.imshow(grid.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_yticks(range(kernel**2), positions if number == 0 else [""] * kernel**2, fontsize=8)
        axis.set_xticks(range(0, depth, max(1, depth // 8)), range(1, depth + 1, max(1, depth // 8)), fontsize=8)
        axis.set(xlabel=f"{kernel}×{kernel} layer, from the input")
        axis.set_title(name, fontsize=10)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.9, label="max-normalised Σ|F|")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _clean(axis: Any, grid: str) -> None:
    axis.grid(True, axis=grid, color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
