"""The README's chart and table of committed results: `make figures`.

    python -m benchmarks.overview benchmarks/results/* --chart docs/assets/overview.svg --page README.md

Each panel is of one directory's CSVs, the newest that has them; machines and dates are below.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from acnet_kernels.paper.training.report import new_figure

from . import analysis, harness, report
from .analysis import OURS, Steps
from .harness import Row
from .plots import style

BEGIN, END = "<!-- measured: what `make figures` makes of benchmarks/results -->", "<!-- end of measured -->"
SAVER = "memory_saver"
KINDS = {"block": "blocks", "network": "ACNets", "accelerated": "other libraries' networks"}
DTYPES = {"float32": ("#56B4E9", "o"), "bfloat16": ("#0072B2", "s")}


def newest(results: Sequence[report.Results], kind: str) -> dict[str, list[Row]]:
    """By dtype, the rows of this kind in the directory that has the newest, of one day the last given; or {}."""
    found = [getattr(result, kind) for result in reversed(results) if getattr(result, kind)]
    return max(found, key=lambda rows: max(row.date for own in rows.values() for row in own), default={})


def speedups(rows: list[Row], to: str = "eager") -> dict[str, float]:
    """Shape or network → how many times as fast as `to` ours is."""
    steps = analysis.steps(rows)
    return {s: of[to].p50 / of[OURS].p50 for s, of in steps.items() if {to, OURS} <= of.keys()}


def short(network: str) -> str:
    """'resnet56' of 'timm:resnet56 16x3x32x32'."""
    return network.partition(" ")[0].rpartition(":")[2]


def source(rows: dict[str, list[Row]]) -> str:
    """Where and when rows were measured."""
    first = next(iter(rows.values()))[0]
    return f"{first.device}, {first.date}"


def chart(results: Sequence[report.Results], path: Path) -> None:
    """Speed-ups of layers and of networks, and what networks keep for backward."""
    figure, axes = new_figure(3, width=11, height=3.6)
    _layers(newest(results, "block"), axes[0])
    _networks([newest(results, "network"), newest(results, "accelerated")], axes[1])
    _memory(newest(results, "memory"), axes[2])
    for axis in axes:
        axis.grid(True, axis="y", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    kinds = ("block", "network", "accelerated", "memory")
    sources = dict.fromkeys(source(rows) for kind in kinds if (rows := newest(results, kind)))
    figure.supxlabel(
        "Plain modules: the same blocks as nn.Conv2d and nn.BatchNorm2d. " + "; ".join(sources), fontsize=7
    )
    import matplotlib

    with matplotlib.rc_context(
        {"svg.hashsalt": "overview", "svg.fonttype": "none"}
    ):  # the same rows give the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _layers(rows: dict[str, list[Row]], axis: Any) -> None:
    if not rows:
        return
    for dtype, own in rows.items():
        values = sorted(speedups(own).values())
        colour, mark = DTYPES.get(dtype, ("#999999", "x"))
        axis.plot(range(1, len(values) + 1), values, mark, color=colour, markersize=4, label=dtype)
    axis.axhline(1, color="black", linewidth=1)
    axis.set(xlabel="layers, slowest to fastest", ylabel="times as fast as plain modules", yscale="log")
    ticks = [1, 1.5, 2, 3, 4, 6, 8]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title("a step of one ACNet block", fontsize=10)


def _networks(kinds: Sequence[dict[str, list[Row]]], axis: Any) -> None:
    kinds = [rows for rows in kinds if rows]
    if not kinds:
        return
    bars = {dtype: {} for rows in kinds for dtype in rows}
    for rows in kinds:
        for dtype, own in rows.items():
            bars[dtype] |= {short(name): value for name, value in speedups(own).items()}
    names = list(dict.fromkeys(name for values in bars.values() for name in values))
    _bars(axis, names, {dtype: (values, DTYPES.get(dtype, ("#999999", ""))[0]) for dtype, values in bars.items()})
    axis.set_title("a step of a network, times as fast", fontsize=10)


def _memory(rows: dict[str, list[Row]], axis: Any) -> None:
    if not rows:
        return
    dtype = "bfloat16" if "bfloat16" in rows else next(iter(rows))
    kept: Steps = analysis.steps(rows[dtype], "saved_bytes")
    names = {network: short(network) for network, of in kept.items() if "eager" in of}
    shown = {}
    for contender in ("plain", OURS, SAVER):
        shares = {
            name: kept[n][contender].p50 / kept[n]["eager"].p50 for n, name in names.items() if contender in kept[n]
        }
        shown[contender] = (shares, style("plain" if contender == "plain" else contender)[0])
    _bars(axis, list(names.values()), shown)
    axis.set_title(f"kept for backward, of plain modules', {dtype}", fontsize=10)


def _bars(axis: Any, names: Sequence[str], series: dict[str, tuple[dict[str, float], str]]) -> None:
    series = {label: (values, colour) for label, (values, colour) in series.items() if values}
    for number, (label, (values, colour)) in enumerate(series.items()):
        at = [i + 0.8 * ((number + 0.5) / len(series) - 0.5) for i in range(len(names))]
        heights = [values.get(name, 0) for name in names]
        axis.bar(at, heights, 0.75 / len(series), color=colour, label=label)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7.5)
    axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # the legend is to cover no bar, whatever the bars are
    axis.legend(fontsize=8, loc="upper right")


def table(results: Sequence[report.Results]) -> str:
    """The README's table, a line for each kind of result, and where they were measured."""
    lines: dict[str, dict[str, str]] = {}
    sources: dict[str, list[str]] = {}
    for kind in ("block", "network", "accelerated"):
        of_kind = newest(results, kind)
        for dtype, rows in of_kind.items():
            found = speedups(rows)
            if kind == "block" and found:
                values = found.values()
                of_line = lines.setdefault(f"ACNet blocks of {len(found)} layers, median (all)", {})
                of_line[dtype] = f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
            elif kind != "block":
                for name, value in found.items():
                    lines.setdefault(short(name), {})[dtype] = f"{value:.2f}"
        if of_kind:
            sources.setdefault(source(of_kind), []).append(KINDS[kind])
    dtypes = list(dict.fromkeys(dtype for values in lines.values() for dtype in values))
    rows = [(name, *(values.get(dtype, "") for dtype in dtypes)) for name, values in lines.items()]
    told = "; ".join(f"{', '.join(kinds)}: {where}" for where, kinds in sources.items())
    return f"{harness.table(('training step of', *dtypes), rows)}\n\nMeasured: {told}."


def written(page: str, text: str) -> str:
    """The page with the text between its marks; ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="directories of CSVs")
    parser.add_argument("--chart", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    options = parser.parse_args()
    results = [report.read(path) for path in options.results if path.is_dir()]
    chart(results, options.chart)
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(written(page, table(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
