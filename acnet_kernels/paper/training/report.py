"""What a run leaves behind: report.json, curves.png and kernels.png. The plots need matplotlib."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import __version__
from ...atomic import replacing
from .folding import FoldCheck
from .loop import Trainer

# How the plots call the blocks' networks, in training and folded.
# Block → its name in tables and figures, trained and folded.
LABELS = {
    "plain": "plain",
    "acb": "ACNet",
    "acb-hor": "+ horizontal",
    "acb-ver": "+ vertical",
    "acb-sum": "ACNet, one batch norm",
    "acb-3": "ACNet, 1×3 and 3×1",
    "acb-border": "border-shifted",
}
FOLDED_LABELS = {block: label if block == "plain" else f"{label}, folded" for block, label in LABELS.items()}
PARTS = ("train", "test")
# Okabe and Ito's colours: told apart by everyone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def parameters(model: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in model.parameters())


def kernel_magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """Layer name → Σ|F| over filters and channels at each kernel position, its maximum scaled to 1 (k×k, float64).

    Of the network's convolutions of its commonest square kernel size above 1 (paper Fig. 6).
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    sizes = Counter(conv.kernel_size for conv in convs.values() if conv.kernel_size[0] == conv.kernel_size[1] > 1)
    if not sizes:
        return {}
    size = sizes.most_common(1)[0][0]
    sums = {
        name: conv.weight.detach().double().abs().sum((0, 1)).cpu()
        for name, conv in convs.items()
        if conv.kernel_size == size
    }
    return {name: total / total.max() for name, total in sums.items()}


def mean_magnitude(layers: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers of `kernel_magnitudes`, k×k: the matrix A of paper Fig. 6."""
    return torch.stack(list(layers.values())).mean(0)


def machine(device: torch.device) -> dict[str, Any]:
    """Where the run took place, as far as its figures depend on it."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "acnet_kernels": __version__,
    }


def run_report(trainer: Trainer, folded: nn.Module, check: FoldCheck | None) -> dict[str, Any]:
    """The content of report.json; check is None for a plain network, where there is nothing to fold."""
    data, layers = trainer.data, kernel_magnitudes(folded)
    return {
        "recipe": asdict(trainer.recipe),
        "data": {
            "name": data.name,
            "source": data.source,
            "train_images": data.train_images,
            "test_images": data.test_images,
            "classes": data.classes,
        },
        "machine": machine(trainer.device),
        "parameters": {"trained": parameters(trainer.model), "folded": parameters(folded)},
        "final": trainer.history[-1],
        "best": {"test_accuracy": trainer.best["accuracy"], "epoch": trainer.best["epoch"] + 1},
        "fold": None if check is None else check._asdict(),
        "kernel_magnitude": {
            "mean": mean_magnitude(layers).tolist() if layers else None,
            "layers": {name: matrix.tolist() for name, matrix in layers.items()},
        },
        "history": trainer.history,
    }


def write_json(content: Any, path: Path) -> None:
    """content as indented JSON."""
    with replacing(path) as file:
        file.write(f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode())


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], title: str, path: Path) -> None:
    """Loss and error over the epochs, training dashed and test solid, one colour a run.

    Args:
        histories: label → rows of `Trainer.history`.
        title: over both panels.
        path: the PNG to write.
    """
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

    figure, axes = new_figure(2, width=9.0, height=3.8)
    for (label, rows), colour in zip(histories.items(), COLOURS, strict=False):
        epochs = [row["epoch"] for row in rows]
        marker = "o" if len(rows) < 12 else None
        for part, style in zip(PARTS, ("--", "-"), strict=True):
            look = {"linestyle": style, "color": colour, "marker": marker, "markersize": 3.5}
            look["label"] = f"{label}, {part}"
            axes[0].plot(epochs, [row[f"{part}_loss"] for row in rows], **look)
            axes[1].plot(epochs, [100 * (1 - row[f"{part}_accuracy"]) for row in rows], **look)
    axes[0].set(ylabel="cross-entropy loss", yscale="log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    # Linear below 1%, so that an error of 0 has a place.
    axes[1].set(ylabel="error (%)")
    axes[1].set_yscale("symlog", linthresh=1, linscale=0.5)
    if max(row[f"{part}_accuracy"] for rows in histories.values() for row in rows for part in PARTS) > 0.99:
        axes[1].set_ylim(bottom=0)
    low, high = axes[1].get_ylim()
    ticks = [tick for tick in (0, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= tick <= high]
    axes[1].yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 2 else MaxNLocator(5))
    for axis in axes:
        axis.set(xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def plot_kernels(matrices: Mapping[str, Tensor], title: str, path: Path) -> None:
    """Heat maps with numbers of `mean_magnitude`, side by side on one colour scale from 0 to 1 (paper Fig. 6).

    Args:
        matrices: label → k×k matrix.
        title: over all panels.
        path: the PNG to write.
    """
    figure, axes = new_figure(len(matrices), width=3.2 * len(matrices) + 0.9, height=3.6)
    for axis, (label, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
        for (row, column), value in ((at, float(matrix[at])) for at in _positions(matrix)):
            colour = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=11)
        axis.set_title(label, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.85, label="mean of max-normalised Σ|F|")
    figure.suptitle(title)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _positions(matrix: Tensor) -> list[tuple[int, int]]:
    rows, columns = matrix.shape
    return [(row, column) for row in range(rows) for column in range(columns)]


def new_figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A matplotlib figure of so many panels in a row, and their axes; width and height in inches."""
    # The object interface: no global figure, no display, safe in any thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
