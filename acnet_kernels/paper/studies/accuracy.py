"""Plain against ACNet, network by network (paper Tables 1 to 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.report import LABELS, parameters
from . import evaluate, paper, plots
from .config import StudyConfig
from .lab import Lab
from .study import (
    Cell,
    Difference,
    Measured,
    Network,
    Study,
    Table,
    by,
    by_seed,
    difference,
    percent,
    top1,
    training_cells,
)

BLOCKS = ("plain", "acb")
# Network → the block it had in the authors' first version, where that is another.
FIRST_VERSION = {"cifar-quick": "acb-3"}


def cells(config: StudyConfig) -> list[Cell]:
    found = []
    for recipe in config.accuracy:
        first = FIRST_VERSION.get(recipe.net)
        found += training_cells(config, BLOCKS if first is None else (*BLOCKS, first), recipe)
    return found


def measure(lab: Lab, cell: Cell) -> dict[str, Any]:
    return {**evaluate.measure(lab, cell), "parameters_trained": parameters(lab.network(cell))}


# Column → the published figures in it.
PUBLISHED = {
    "paper": paper.TABLES,
    "authors' README, cosine and γ = 1/3": paper.AUTHORS_COSINE,
    "authors' first README, steps": paper.AUTHORS_STEPS,
}


def published(tables: dict[tuple[str, str], paper.Published], results: Sequence[Measured]) -> str:
    """'plain → ACNet' of one of `paper`'s tables; '' where unknown."""
    found = paper.find(tables, results)
    return f"{found.plain:.2f} → {found.acb:.2f}" if found else ""


def table(results: Sequence[Measured]) -> Table:
    header = (
        "network",
        "data",
        "training",
        "seeds",
        "plain top-1 (%)",
        "ACNet top-1 (%)",
        "gain (points, ± standard error)",
        "plain top-5 (%)",
        "ACNet top-5 (%)",
        *SMALL_LINES,
        *PUBLISHED,
    )
    rows: list[tuple[str, ...]] = []
    for of, (pair, gain) in _complete(results).items():
        blocks = by(pair, "block")
        columns = {name: [percent([v[name] for v in blocks[b]]) for b in BLOCKS] for name in ("top1", "top5")}
        rows.append(
            (
                of.net,
                Path(of.data).name,
                of.recipe if of.backend == "auto" else f"{of.recipe}, backend {of.backend}",
                str(gain.pairs),
                *columns["top1"],
                str(gain),
                *columns["top5"],
                *_small_lines(results, of),
                *(published(tables, pair) for tables in PUBLISHED.values()),
            )
        )
    return Table(header, rows).without_empty(*SMALL_LINES, *PUBLISHED)


# Of the networks whose lines are shorter than their kernels in the authors' first version.
SMALL_LINES = "ACNet with 1×3 and 3×1, top-1 (%)", "its gain (points, ± standard error)"


def _small_lines(results: Sequence[Measured], of: Network) -> tuple[str, str]:
    """What stands in the columns `SMALL_LINES` of this network."""
    same = [r for r in results if Network.of(r.cell)._replace(block="", seed=0) == of]
    measured = by_seed(same, top1)
    lines = measured.get(FIRST_VERSION.get(of.net, ""), {})
    gain = difference(lines, measured.get("plain", {}))
    if gain is None:
        return "", ""
    return percent([value / 100 for value in lines.values()]), str(gain)


def _complete(results: Sequence[Measured]) -> dict[Network, tuple[list[Measured], Difference]]:
    """Network without block and seed → its results with seeds that both forms have, and the ACNet's gain there."""
    groups: dict[Network, list[Measured]] = {}
    for result in results:
        groups.setdefault(Network.of(result.cell)._replace(block="", seed=0), []).append(result)
    found = {}
    for of, group in groups.items():
        plain, acb = (by_seed(group, top1).get(block, {}) for block in BLOCKS)
        gain = difference(acb, plain)
        if gain is not None:
            found[of] = [r for r in group if r.cell["seed"] in plain.keys() & acb.keys()], gain
    return found


def finding(results: Sequence[Measured]) -> str:
    gains = [gain for _, gain in _complete(results).values()]
    beyond = [gain for gain in gains if gain.shown]
    return (
        f"The ACNet's mean is above the plain network's for {sum(gain.mean > 0 for gain in gains)} of {len(gains)} "
        f"networks; by more than two standard errors above for {sum(gain.mean > 0 for gain in beyond)}, below for "
        f"{sum(gain.mean < 0 for gain in beyond)}."
    )


def plot(results: Sequence[Measured], path: Path) -> None:
    panels: dict[str, dict[str, list[float]]] = {}
    names = Counter((of.net, of.data) for of in {Network.of(r.cell)._replace(block="", seed=0) for r in results})
    for result in results:
        of = Network.of(result.cell)
        # Networks that differ in their training alone are told apart by it.
        trained = f"\n{of.recipe}, {of.backend}" if names[of.net, of.data] > 1 else ""
        panel = panels.setdefault(f"{of.net}, {Path(of.data).name}{trained} (%)", {})
        panel.setdefault(LABELS[of.block], []).append(result.values["top1"])
    plots.dots(panels, "test accuracy", path)


STUDY = Study(
    name="accuracy",
    title="Accuracy, plain and ACNet",
    paper=(
        "Tables 1 to 3: the ACNet was more accurate than the plain network with every architecture on CIFAR-10, "
        "CIFAR-100 and ImageNet. Of DenseNet-121 on ImageNet the table has +0.67 points, the text +1.18."
    ),
    limits=(
        "Accuracy of the folded network after the last epoch, never the best one; ± is the standard deviation over "
        "seeds, of gains the standard error of the mean paired difference. Published figures stand beside ours "
        "only where data and network are the same. Our full-length recipes are those of the authors' code of "
        "today, whose README has the column 'cosine and γ = 1/3' (γ = 1 on ImageNet); its first version lowered "
        "the rate in steps, started at γ = 1 and gave Cifar-quick's 5×5 layers 1×3 and 3×1 branches, which has "
        "columns of its own here, trained like the others. The paper's plain Cifar-quick and VGG had no batch "
        "norm; both versions of the code added it, and ours have it."
    ),
    cells=cells,
    measure=measure,
    table=table,
    finding=finding,
    plots={"accuracy.png": plot},
    compares_networks=True,
)
