"""The report's figures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from acnet_kernels.paper.training.report import new_figure

from . import analysis
from .analysis import Phases, Steps
from .harness import Row

# Okabe and Ito's colours, told apart by everyone, and marks that tell them apart without colour.
STYLES: dict[str, tuple[str, str]] = {
    "plain": ("#009E73", "*"),
    "conv+bn": ("#009E73", "*"),
    "eager": ("#000000", "h"),
    "compile": ("#D55E00", "^"),
    "reduce-overhead": ("#882255", "v"),
    "3k": ("#E69F00", "P"),
    "checkpoint": ("#999999", "X"),
    "moments": ("#CC79A7", "D"),
    "branches": ("#56B4E9", "s"),
    "recompute": ("#F0E442", "p"),
    "auto": ("#0072B2", "o"),
    "memory_saver": ("#CC79A7", "D"),
}
SPARE = ("#BBBBBB", "d")


def present(rows: Iterable[Iterable[str]]) -> list[str]:
    """The contenders in any of these, in the figures' order, those without a style of their own last."""
    found = dict.fromkeys(name for names in rows for name in names)
    return [name for name in STYLES if name in found] + [name for name in found if name not in STYLES]


def style(name: str) -> tuple[str, str]:
    """(colour, mark) of a contender."""
    return STYLES.get(name, SPARE)


def speedups(found: Steps, title: str, path: Path) -> None:
    """Shape by shape, how many times as fast as the better eager layout each contender is, from p20 to p80."""
    shapes = [shape for shape in found if "eager" in found[shape]]
    names = [name for name in present(found.values()) if name != "eager"]
    figure, (axis,) = new_figure(1, width=9.5, height=0.42 * len(shapes) + 1.6)
    for number, name in enumerate(names):
        offset = 0.7 * ((number + 0.5) / len(names) - 0.5)
        at, middles, lows, highs = [], [], [], []
        for row, shape in enumerate(shapes):
            if name in found[shape]:
                low, middle, high = analysis.ratio(found[shape]["eager"], found[shape][name])
                at.append(row + offset)
                middles.append(middle)
                lows.append(max(middle - low, 0))
                highs.append(max(high - middle, 0))
        colour, mark = style(name)
        axis.errorbar(
            middles, at, xerr=(lows, highs), fmt=mark, color=colour, markersize=4.5, linewidth=0.9, label=name
        )
    for row in range(0, len(shapes), 2):
        axis.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=0)
    axis.axvline(1, color="black", linewidth=1, zorder=1)
    _logarithmic(axis)
    axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axis.set(ylim=(len(shapes) - 0.5, -0.5), xlabel="times as fast as the better eager layout (log); bars p20–p80")
    axis.set_title(title, fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=7, frameon=False, fontsize=8.5)
    figure.savefig(path)


def _logarithmic(axis: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 0.75, 1, 1.33, 2, 3, 5, 8]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(True, axis="x", color="0.88")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


LEAST_SHARE = 0.05  # of a step, for a phase to be drawn
MARKS = {"convolution forward": "o", "convolution backward": "s", "matrix products": "^"}


class Point(NamedTuple):
    """One phase of one step: operations and bytes a nanosecond."""

    backend: str
    phase: str
    gflops: float
    gbytes: float


def roofline(made_of: Phases, ceilings: dict[str, float], title: str, path: Path) -> None:
    """Every phase of every backend: arithmetic phases under the two ceilings, the others by their traffic.

    Left, operations a second over operations a byte; right, GB/s beside the copy's. A phase of under LEAST_SHARE of
    its step is left out. Traffic is every operand and result once: what stays in cache between two operators counts
    too, so a phase may lie above the copy.
    """
    points = [
        Point(backend, name, 1e3 * phase["gflop"] / phase["time_ms"], 1e3 * phase["gbyte"] / phase["time_ms"])
        for of_shape in made_of.values()
        for backend, phases in of_shape.items()
        if backend != analysis.OURS  # one of the others again
        for name, phase in phases.items()
        if phase["gbyte"] and phase["time_ms"] > LEAST_SHARE * sum(p["time_ms"] for p in phases.values())
    ]
    figure, (left, right) = new_figure(2, width=12, height=6)
    _arithmetic([point for point in points if point.gflops], ceilings, left)
    _streaming([point for point in points if not point.gflops], ceilings["copy"], right)
    for axis in (left, right):
        axis.grid(True, color="0.9", which="major")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _arithmetic(points: list[Point], ceilings: dict[str, float], axis: Any) -> None:
    axis.set(xlabel="FLOP a byte", ylabel="GFLOP/s")
    axis.set_title("phases of multiply-adds", fontsize=10)
    if not points:
        return
    for backend, name in dict.fromkeys((point.backend, point.phase) for point in points):
        own = [point for point in points if (point.backend, point.phase) == (backend, name)]
        at = [point.gflops / point.gbytes for point in own], [point.gflops for point in own]
        axis.plot(*at, MARKS.get(name, "D"), label=f"{backend}: {name}", **_dots(backend))
    intensities = [point.gflops / point.gbytes for point in points]
    low, high = min(intensities) / 2, 2 * max(intensities)
    corners = sorted({low, min(max(ceilings["gemm"] / ceilings["copy"], low), high), high})
    tops = [min(ceilings["copy"] * x, ceilings["gemm"]) for x in corners]
    axis.plot(corners, tops, color="black", linewidth=1.2, label="copy and matrix product in this run")
    axis.set(xscale="log", yscale="log")
    _plain_numbers(axis.xaxis)
    _plain_numbers(axis.yaxis)


def _streaming(points: list[Point], copy: float, axis: Any) -> None:
    names, backends = sorted({point.phase for point in points}), present([[point.backend] for point in points])
    for number, backend in enumerate(backends):
        own = [point for point in points if point.backend == backend]
        offset = 0.5 * ((number + 0.5) / len(backends) - 0.5)
        at = [point.gbytes for point in own], [names.index(point.phase) + offset for point in own]
        axis.plot(*at, style(backend)[1], label=backend, **_dots(backend))
    axis.axvline(copy, color="black", linewidth=1.2, label="copy in this run")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="GB/s of operands and results", xscale="log")
    if names:
        axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title("phases without", fontsize=10)
    _plain_numbers(axis.xaxis)


def _dots(backend: str) -> dict[str, Any]:
    return {"color": style(backend)[0], "markersize": 5, "alpha": 0.7, "markeredgewidth": 0}


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(panels: dict[str, dict[str, dict[str, Row]]], scale: float, label: str, title: str, path: Path) -> None:
    """A panel each: groups of bars, one a contender, with a whisker from p20 to p80.

    Args:
        panels: panel's title → group → contender → row.
        scale: what rows' values are divided by.
        label: of the axis.
        title: over all.
        path: the PNG to write.
    """
    names = present(rows for groups in panels.values() for rows in groups.values())
    figure, axes = new_figure(len(panels), width=6.2 * len(panels), height=4.2)
    for axis, (panel, groups) in zip(axes, panels.items(), strict=True):
        width = 0.84 / len(names)
        for number, name in enumerate(names):
            places = [
                i + (number - len(names) / 2 + 0.5) * width for i, g in enumerate(groups) if name in groups[g]
            ]
            rows = [groups[g][name] for g in groups if name in groups[g]]
            spread = ([(r.p50 - r.p20) / scale for r in rows], [(r.p80 - r.p50) / scale for r in rows])
            axis.bar(places, [r.p50 / scale for r in rows], 0.92 * width, color=style(name)[0], label=name)
            axis.errorbar(
                places, [r.p50 / scale for r in rows], yerr=spread, fmt="none", color="0.25", linewidth=0.9
            )
        axis.set_xticks(range(len(groups)), [g.replace(" ", "\n") for g in groups], fontsize=8.5)
        axis.set_title(panel, fontsize=10)
        axis.grid(True, axis="y", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8.5)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
