"""Which positions of its kernels a trained network can spare (paper Fig. 5)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.report import LABELS, kernel_magnitudes
from . import plots
from .evaluate import accuracies
from .lab import Lab
from .plan import Plan
from .regions import kernel_of, regions
from .study import Cell, Measured, Study, Table, by, mean_std, percent, subject, training_cells

# What the added branches strengthen, and what they leave, in each network.
STUDIED = {
    "plain": ("corners", "skeleton", "anywhere"),
    "acb": ("corners", "skeleton", "anywhere"),
    "acb-border": ("top left", "border", "anywhere"),
}
STEP = Fraction(1, 18)
QUOTED = Fraction(2, 9)  # half of a 3×3 kernel's corners: where curves are still apart


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
    return sorted({*(STEP * step for step in range(int(end / STEP) + 1)), end})


def cells(plan: Plan) -> list[Cell]:
    # One trained network a kind, as in the paper; without pruning there is nothing to repeat.
    kernel = kernel_of(plan.recipe.net)
    return [
        {**network, "kernel": kernel, "region": region, "sparsity": str(sparsity), "pruning": pruning}
        for network in training_cells(plan, STUDIED)
        if not network["seed"]
        for region in STUDIED[str(network["block"])]
        for sparsity in sparsities(region, kernel)
        for pruning in range(plan.prunings if sparsity else 1)
    ]


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(cell["pruning"]))
    pruned = prune(lab.folded(cell), str(cell["region"]), Fraction(str(cell["sparsity"])), generator)
    return {"top1": accuracies(pruned, lab.data(cell))[0]}


def curve(results: Sequence[Measured], block: str, region: str) -> dict[Fraction, list[float]]:
    """Sparsity → accuracies of the prunings measured."""
    chosen = [r for r in results if (r.cell["block"], r.cell["region"]) == (block, region)]
    groups = {Fraction(s): [v["top1"] for v in values] for s, values in by(chosen, "sparsity").items()}
    return dict(sorted(groups.items()))


def kernel_size(results: Sequence[Measured]) -> int:
    """k of the layers that were pruned."""
    return int(results[0].cell["kernel"])


def table(results: Sequence[Measured]) -> Table:
    kernel = kernel_size(results)
    shown = sorted({*(Fraction(n, 9) for n in range(6)), share("corners", kernel), share("skeleton", kernel)})
    header = ("network", "zeros in", *(f"{float(s):.0%}" for s in shown))
    rows = []
    for block, parts in STUDIED.items():
        for region in parts:
            points = curve(results, block, region)
            if points:
                columns = (percent(points[s]) if s in points else "" for s in shown)
                rows.append((LABELS[block], region, *columns))
    return Table(header, rows)


def finding(results: Sequence[Measured]) -> str:
    sentences = []
    for block, (spared, strengthened, _) in STUDIED.items():
        kept, hurt = (curve(results, block, region).get(QUOTED) for region in (spared, strengthened))
        if kept and hurt:
            sentences.append(
                f"{LABELS[block]} {100 * mean_std(kept)[0]:.1f} % with zeros in the {spared}, "
                f"{100 * mean_std(hurt)[0]:.1f} % in the {strengthened}"
            )
    return f"At a sparsity of {QUOTED}: {'; '.join(sentences)}." if sentences else ""


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
        "Fig. 5, ResNet-56 on CIFAR-10: zeros in the corners cost less accuracy than as many in the skeleton, in "
        "the plain network and in the ACNet; the border-shifted network was asked the same of its border (bottom "
        "row and right column) and its top left 2×2. A sparsity of 44 % (4/9) takes nearly all the corners."
    ),
    limits=(
        "Zeros are drawn at random in the folded network, without retraining; sparsity counts all weights of the "
        "layers pruned, those of the network's commonest kernel size, and the same share is taken from each. ± and "
        "bands are over the draws in one trained network a kind (the one of seed 0), so they do not contain the "
        "spread over trainings. Border and skeleton are five of a 3×3 kernel's nine positions, corners and top "
        "left four: compare at equal sparsity."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"pruning.png": plot},
)
