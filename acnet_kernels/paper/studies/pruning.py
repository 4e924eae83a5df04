"""Which positions of its kernels a trained network can spare (paper Fig. 5)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from ..training.report import LABELS, kernel_magnitudes
from . import plots
from .config import StudyConfig
from .evaluate import accuracies
from .lab import Lab
from .regions import kernel_of, regions
from .study import Cell, Measured, Study, Table, by, percent, subject, training_cells

# The parts that each network is pruned in. The border-shifted one must also lose the ACNet's, or its curves would
# say nothing of the skeleton.
STUDIED = {
    "plain": ("corners", "skeleton", "anywhere"),
    "acb": ("corners", "skeleton", "anywhere"),
    "acb-border": ("corners", "skeleton", "anywhere", "top left", "border"),
}
STEP = Fraction(1, 18)
SKELETON_QUOTED = Fraction(13, 100)  # the paper's point for the skeleton; for the corners it is all of them
COMPARED = Fraction(2, 9)  # half of a 3×3 kernel's corners: where curves are still apart


def prune_weight(weight: Tensor, region: str, sparsity: Fraction, generator: torch.Generator) -> None:
    """Sets weights (K×C×k×k) in a region of their kernels to zero, in place, so that `sparsity` of all of them are.

    Which ones is drawn without replacement, every weight in the region being equally likely. Sparsity counts
    over all k² positions: (k−1)²/k² from the corners takes every corner weight.

    Raises:
        ValueError: there are fewer weights in the region than the sparsity asks for.
    """
    filters, channels, kernel, _ = weight.shape
    rows, columns = zip(*sorted(regions(kernel)[region]), strict=True)
    chosen = weight[:, :, rows, columns].reshape(-1)
    count = round(sparsity * weight.numel())
    if count > chosen.numel():
        raise ValueError(
            f"sparsity must be at most {len(rows)}/{kernel**2}, the share of the positions pruned, got {sparsity}"
        )
    chosen[torch.randperm(chosen.numel(), generator=generator)[:count].to(chosen.device)] = 0
    weight[:, :, rows, columns] = chosen.view(filters, channels, len(rows))


@torch.no_grad()
def prune(model: nn.Module, region: str, sparsity: Fraction, generator: torch.Generator) -> nn.Module:
    """A copy of a folded network with `prune_weight` applied to every layer of its commonest kernel size."""
    model = copy.deepcopy(model)
    for name in kernel_magnitudes(model):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        prune_weight(weight, region, sparsity, generator)
    return model


def share(region: str, kernel: int) -> Fraction:
    """The region's part of all k² positions."""
    return Fraction(len(regions(kernel)[region]), kernel**2)


def sparsities(region: str, kernel: int) -> list[Fraction]:
    """The curve's points: steps of 1/18 up to the whole region; anywhere, up to as much as the largest one's."""
    parts = regions(kernel) if region == "anywhere" else (region,)
    end = max(share(part, kernel) for part in parts if part != "anywhere")
    return sorted({*(STEP * step for step in range(int(end / STEP) + 1)), SKELETON_QUOTED, end})


def cells(config: StudyConfig) -> list[Cell]:
    kernel = kernel_of(config.recipe.net)
    return [
        {**network, "kernel": kernel, "region": region, "sparsity": str(sparsity), "pruning": pruning}
        for network in training_cells(config, STUDIED)
        for region in STUDIED[str(network["block"])]
        for sparsity in sparsities(region, kernel)
        for pruning in range(config.prunings if sparsity else 1)  # without pruning there is nothing to repeat
    ]


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(cell["pruning"]))
    pruned = prune(lab.folded(cell), str(cell["region"]), Fraction(str(cell["sparsity"])), generator)
    return {"top1": accuracies(pruned, lab.data(cell))[0]}


def curve(results: Sequence[Measured], block: str, region: str) -> dict[Fraction, list[float]]:
    """Sparsity → accuracy of each trained network, the mean over its prunings."""
    chosen = [r for r in results if (r.cell["block"], r.cell["region"]) == (block, region)]
    found: dict[Fraction, list[float]] = {}
    for (sparsity, _), values in sorted(
        by(chosen, "sparsity", "seed").items(), key=lambda group: Fraction(group[0][0])
    ):
        found.setdefault(Fraction(sparsity), []).append(mean(v["top1"] for v in values))
    return found


def kernel_size(results: Sequence[Measured]) -> int:
    """k of the layers that were pruned."""
    return int(results[0].cell["kernel"])


def table(results: Sequence[Measured]) -> Table:
    kernel = kernel_size(results)
    ends = (share("corners", kernel), share("skeleton", kernel))
    shown = sorted({*(Fraction(n, 9) for n in range(6)), SKELETON_QUOTED, *ends})
    header = ("network", "zeros in", "seeds", *(f"{float(s):.0%}" for s in shown))
    rows = []
    for block, parts in STUDIED.items():
        for region in parts:
            points = curve(results, block, region)
            if points:
                columns = (percent(points[s]) if s in points else "" for s in shown)
                rows.append((LABELS[block], region, str(len(points[Fraction(0)])), *columns))
    return Table(header, rows)


def finding(results: Sequence[Measured]) -> str:
    all_corners = share("corners", kernel_size(results))
    sentences = []
    for block, parts in STUDIED.items():
        curves = {part: curve(results, block, part) for part in parts}
        quoted = (("corners", Fraction(0)), ("corners", all_corners), ("skeleton", SKELETON_QUOTED))
        if not all(sparsity in curves[part] for part, sparsity in quoted):
            continue
        whole, corners, skeleton = (100 * mean(curves[part][sparsity]) for part, sparsity in quoted)
        sentence = (
            f"{LABELS[block]}: {whole:.1f} % unpruned, {corners:.1f} % with zeros in all corners "
            f"({100 * float(all_corners):.0f} % of the weights), {skeleton:.1f} % with 13 % zeros, in the skeleton"
        )
        kept = {part: 100 * mean(c[COMPARED]) for part, c in curves.items() if part != "anywhere" and COMPARED in c}
        if kept:
            ranked = ", ".join(f"{part} {kept[part]:.1f} %" for part in sorted(kept, key=lambda part: -kept[part]))
            sentence += f"; at {100 * float(COMPARED):.0f} % zeros: {ranked}"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def plot(results: Sequence[Measured], path: Path) -> None:
    kernel = kernel_size(results)
    panels = {
        LABELS[block]: {region: curve(results, block, region) for region in parts}
        for block, parts in STUDIED.items()
    }
    layers = f"{kernel}×{kernel}"
    title = f"{subject(results)}, zeros in every {layers} layer"
    plots.curves(panels, title, path, mark=share("corners", kernel), layers=layers)


STUDY = Study(
    name="pruning",
    title="Pruning corners or skeleton",
    paper=(
        "Fig. 5, ResNet-56 on CIFAR-10, means of five random prunings: zeros in nearly all the corners (44 % of "
        "the weights, 4/9) cost less than about 13 % zeros in the skeleton, in the plain network and more so in "
        "the ACNet; the border-shifted network was asked the same of its corners and skeleton, and of its border "
        "(bottom row and right column) and top left 2×2."
    ),
    limits=(
        "Zeros are drawn at random in the folded network, without retraining; sparsity counts all weights of the "
        "layers pruned, those of the network's commonest kernel size, and the same share is taken from each. Every "
        "network of the table is pruned; ± and bands are the standard deviation over networks of the mean over a "
        "network's draws. Border and skeleton are five of a 3×3 kernel's nine positions, corners and top left "
        "four: compare at equal sparsity. A small network has few weights to spare and comes to chance where a "
        "ResNet-56 does not."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"pruning.png": plot},
)
