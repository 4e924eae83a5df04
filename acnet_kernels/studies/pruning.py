"""Which positions of the 3×3 kernels a trained network can spare (paper Fig. 5)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.report import LABELS
from . import plots
from .evaluate import accuracies
from .lab import Lab
from .plan import Plan
from .study import Cell, Measured, Study, Table, by, mean_std, percent, subject

Position = tuple[int, int]
ALL = frozenset((row, column) for row in range(3) for column in range(3))
SKELETON = frozenset((row, column) for row, column in ALL if row == 1 or column == 1)
BORDER = frozenset((row, column) for row, column in ALL if row == 2 or column == 2)
REGIONS: dict[str, frozenset[Position]] = {
    "corners": ALL - SKELETON,
    "skeleton": SKELETON,
    "anywhere": ALL,
    "border": BORDER,
    "top-left 2×2": ALL - BORDER,
}
# What the added branches strengthen, and what they leave, in each network.
STUDIED = {
    "plain": ("corners", "skeleton", "anywhere"),
    "acb": ("corners", "skeleton", "anywhere"),
    "acb-border": ("top-left 2×2", "border", "anywhere"),
}
STEP = Fraction(1, 18)
CORNERS = Fraction(4, 9)  # all corner weights
QUOTED = Fraction(2, 9)  # half the corner weights: where curves are still apart
LARGEST = Fraction(5, 9)


def prune_weight(
    weight: Tensor, positions: Collection[Position], sparsity: Fraction, generator: torch.Generator
) -> None:
    """Sets weights (K×C×3×3) at these positions to zero, in place, so that `sparsity` of all its weights are.

    Which ones is drawn without replacement, every weight at the positions being equally likely. Sparsity
    counts over all nine positions: 4/9 from the corners takes every corner weight.

    Raises:
        ValueError: there are fewer weights at the positions than the sparsity asks for.
    """
    rows, columns = zip(*sorted(positions), strict=True)
    filters, channels = weight.shape[:2]
    chosen = weight[:, :, rows, columns].reshape(-1)
    count = round(sparsity * weight.numel())
    if count > chosen.numel():
        raise ValueError(
            f"sparsity must be at most {len(rows)}/9, the share of the positions pruned, got {sparsity}"
        )
    chosen[torch.randperm(chosen.numel(), generator=generator)[:count].to(chosen.device)] = 0
    weight[:, :, rows, columns] = chosen.view(filters, channels, len(rows))


@torch.no_grad()
def prune(
    model: nn.Module, positions: Collection[Position], sparsity: Fraction, generator: torch.Generator
) -> nn.Module:
    """A copy of a folded network with `prune_weight` applied to every 3×3 layer."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            prune_weight(module.weight, positions, sparsity, generator)
    return model


def sparsities(region: str) -> list[Fraction]:
    """The curve's points: steps of 1/18 up to all weights of the region, or 5/9 of all."""
    end = min(Fraction(len(REGIONS[region]), 9), LARGEST)
    return [STEP * step for step in range(int(end / STEP) + 1)]


def cells(plan: Plan) -> list[Cell]:
    # One trained network a kind, as in the paper; without pruning there is nothing to repeat.
    recipe = plan.recipe
    return [
        {
            "data": recipe.data,
            "net": recipe.net,
            "block": block,
            "seed": 0,
            "region": region,
            "sparsity": str(sparsity),
            "pruning": pruning,
        }
        for block, regions in STUDIED.items()
        for region in regions
        for sparsity in sparsities(region)
        for pruning in range(plan.prunings if sparsity else 1)
    ]


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(cell["pruning"]))
    region, sparsity = REGIONS[str(cell["region"])], Fraction(str(cell["sparsity"]))
    return {"top1": accuracies(prune(lab.folded(cell), region, sparsity, generator), lab.data(cell))[0]}


def curve(results: Sequence[Measured], block: str, region: str) -> dict[Fraction, list[float]]:
    """Sparsity → accuracies of the prunings measured."""
    chosen = [r for r in results if (r.cell["block"], r.cell["region"]) == (block, region)]
    groups = {Fraction(s): [v["top1"] for v in values] for s, values in by(chosen, "sparsity").items()}
    return dict(sorted(groups.items()))


def table(results: Sequence[Measured]) -> Table:
    shown = [Fraction(n, 9) for n in range(6)]
    header = ("network", "zeros in", *(f"{float(s):.0%}" for s in shown))
    rows = []
    for block, regions in STUDIED.items():
        for region in regions:
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
    panels = {
        LABELS[block]: {region: curve(results, block, region) for region in regions}
        for block, regions in STUDIED.items()
    }
    plots.curves(panels, f"{subject(results)}, zeros in every 3×3 layer", path, mark=CORNERS)


STUDY = Study(
    name="pruning",
    title="Pruning corners or skeleton",
    paper=(
        "Fig. 5, ResNet-56 on CIFAR-10: zeros in the corners cost less accuracy than as many in the skeleton, in "
        "the plain network and in the ACNet; the border-shifted network was asked the same of its border (bottom "
        "row and right column) and its top-left 2×2. A sparsity of 44 % (4/9) takes nearly all the corners."
    ),
    limits=(
        "Zeros are drawn at random in the folded network, without retraining; sparsity counts all weights of the "
        "3×3 layers, and the same share is taken from each. ± and bands are over the draws in one trained network "
        "a kind (the one of seed 0), so they do not contain the spread over trainings. The border is five of the "
        "nine positions and the skeleton too, but corners and the top-left 2×2 are four: compare at equal sparsity."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"pruning.png": plot},
)
