"""One report of a directory of CSVs: report.html, which needs no other file, report.md, and the figures of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from acnet_kernels.paper.studies import page
from acnet_kernels.paper.studies.study import Table

from . import analysis, harness, plots, shapes
from .analysis import OURS, Steps
from .contenders import COMPILED
from .harness import Row

TITLE = "Benchmark of acnet_kernels"
MIB = 2**20


@dataclass
class Results:
    """The rows of a directory: of each kind of benchmark, by dtype."""

    block: dict[str, list[Row]] = field(default_factory=dict)
    phases: dict[str, list[Row]] = field(default_factory=dict)
    network: dict[str, list[Row]] = field(default_factory=dict)
    memory: dict[str, list[Row]] = field(default_factory=dict)
    fusion: dict[str, list[Row]] = field(default_factory=dict)
    accelerated: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def rows(self) -> Iterator[Row]:
        """All of them."""
        for kind in (self.block, self.phases, self.network, self.memory, self.fusion, self.accelerated):
            for rows in kind.values():
                yield from rows


def read(directory: Path) -> Results:
    """The CSVs in the directory; none where it does not exist."""
    results = Results()
    for kind in ("block", "phases", "network", "memory", "fusion", "accelerated"):
        for path in sorted(directory.glob(f"{kind}*.csv"), key=lambda path: "float32" not in path.stem):
            getattr(results, kind)[path.stem.partition("-")[2] or "float32"] = harness.read_csv(path)
    return results


class Part(NamedTuple):
    """A section: its title, its paragraphs, its table, its figures."""

    title: str
    text: list[str]
    table: Table | None
    figures: list[Path]


def write(directory: Path, before: Results) -> list[Path]:
    """Writes figures and both forms of the report of the directory's CSVs; returns the reports' paths.

    Args:
        directory: where the CSVs are, and the report goes.
        before: what to compare with.
    """
    results = read(directory)
    makers: tuple[Callable[[Results, Path], Part | None], ...] = (
        speed_part,
        roofline_part,
        network_part,
        accelerated_part,
        memory_part,
        fusion_part,
    )
    parts = [part for maker in makers if (part := maker(results, directory))]
    parts += [part for part in (change_part(results, before),) if part]
    first, machine = losing(results), provenance(results)
    markdown, html = directory / "report.md", directory / "report.html"
    markdown.write_text(as_markdown(first, machine, parts), encoding="utf-8")
    html.write_text(as_html(first, machine, parts), encoding="utf-8")
    return [html, markdown]


def as_markdown(first: str, machine: list[str], parts: Sequence[Part]) -> str:
    """The report with its figures beside it."""
    lines = [f"# {TITLE}", first, *machine]
    for part in parts:
        lines += [f"## {part.title}", *part.text]
        if part.table:
            lines.append(harness.table(part.table.header, part.table.rows))
        lines += [f"![{figure.stem}]({figure.name})" for figure in part.figures]
    return "\n\n".join(lines) + "\n"


def as_html(first: str, machine: list[str], parts: Sequence[Part]) -> str:
    """The report with its figures in it."""
    lines = [f"<p>{_inline(first)}</p>", *(f'<p class="note">{_inline(line)}</p>' for line in machine)]
    for part in parts:
        lines += [f"<h2>{escape(part.title)}</h2>", *(f"<p>{_inline(text)}</p>" for text in part.text)]
        lines += [page.image(figure) for figure in part.figures]
        lines += [page.table(part.table)] if part.table else []
    return page.document(TITLE, "\n".join(lines))


def _inline(text: str) -> str:
    """Markdown's **bold** and `code` as HTML."""
    for mark, tag in (("**", "b"), ("`", "code")):
        pieces = (escape(text) if mark == "**" else text).split(mark)
        opened = [f"<{tag}>{piece}</{tag}>" if i % 2 else piece for i, piece in enumerate(pieces)]
        text = "".join(opened)
    return text


def provenance(results: Results) -> list[str]:
    """Where, with what and by which commands the rows were made."""
    found = dict.fromkeys(
        f"{row.device}; torch {row.torch}, Triton {row.triton or 'none'}"
        f"{f', cuDNN {row.cudnn}, driver {row.driver}' if row.cudnn else ''}; {row.date}; `{row.command}`"
        for row in results.rows
    )
    return ["Medians of interleaved runs; ranges are p20–p80.", *found]


def losing(results: Results) -> str:
    """The report's first paragraph: where `auto` is slower than what it replaces and than its peers, and why."""
    sentences = ["**Where we lose.**"]
    for dtype, rows in results.block.items():
        found, parts = analysis.steps(rows), results.phases.get(dtype, [])
        made_of, tops = analysis.phases(parts), analysis.ceilings(parts)
        sentences += [_against(dtype, others, found, made_of, tops) for others in (("eager",), (*COMPILED, "3k"))]
        bound = analysis.summary(found, OURS, "conv+bn")
        if bound:
            _, least, middle, most = bound
            sentences.append(
                f"Plain conv+BN, the bound, takes {least:.2f}–{most:.2f} of `{OURS}` (median {middle:.2f})."
            )
        sentences += _backends(found, made_of, tops)
    for dtype, rows in results.network.items():
        for network, times in analysis.steps(rows).items():
            if OURS in times and "eager" in times and times[OURS].p50 > analysis.LOSS * times["eager"].p50:
                share = times[OURS].p50 / times["eager"].p50
                sentences.append(f"{network} in {dtype} takes {share:.2f} times eager's step.")
    for dtype, rows in results.memory.items():
        kept = analysis.steps(rows, "saved_bytes")
        more = {n: of[OURS].p50 / of["eager"].p50 for n, of in kept.items() if {OURS, "eager"} <= of.keys()}
        more = {network: times for network, times in more.items() if times > analysis.LOSS}
        if more:
            listed = ", ".join(f"{network} {times:.2f}×" for network, times in more.items())
            sentences.append(
                f"In {dtype} `{OURS}` keeps more for backward than eager ({listed}): maps of wider type."
            )
    if len(sentences) == 1:
        sentences.append("Nothing of what was measured shows it.")
    return " ".join(sentence for sentence in sentences if sentence)


def _against(
    dtype: str, others: tuple[str, ...], found: Steps, made_of: analysis.Phases, tops: dict[str, float]
) -> str:
    """A sentence on the losses of `auto` against the fastest of the others."""
    compared = sum(OURS in times and any(name in times for name in others) for times in found.values())
    if not compared:
        return ""
    lost = analysis.losses(found, made_of, tops, others)
    name = "eager's better layout" if others == ("eager",) else "the faster of torch.compile and the 3K trick"
    if not lost:
        limit = f"{analysis.LOSS - 1:.0%}"
        return f"{dtype} steps: `{OURS}` is nowhere more than {limit} behind {name} ({compared} shapes)."
    told = []
    for group in analysis.groups(lost).values():
        worst = ", ".join(f"{loss.shape} {loss.times:.2f}×{'' if loss.certain else '?'}" for loss in group[:4])
        more = f" and {len(group) - 4} more" if len(group) > 4 else ""
        told.append(f"{worst}{more}: {group[0].reason}")
    doubt = "" if all(loss.certain for loss in lost) else " (? where the ranges overlap)"
    return (
        f"{dtype} steps: `{OURS}` is more than {analysis.LOSS - 1:.0%} behind {name} on {len(lost)} of {compared} "
        f"shapes{doubt}: {'; '.join(told)}."
    )


def _backends(found: Steps, made_of: analysis.Phases, tops: dict[str, float]) -> Iterator[str]:
    """A sentence for each backend that `auto` leaves alone on most shapes because it is slower there."""
    for name in dict.fromkeys(contender for times in found.values() for contender in times):
        slower = analysis.summary(found, "eager", name)
        if name not in analysis.ours() or name == OURS or slower is None or slower[2] < analysis.LOSS:
            continue
        shape = max(
            (s for s in found if name in found[s]), key=lambda s: found[s][name].p50 / found[s]["eager"].p50
        )
        reason = analysis.why("eager", made_of.get(shape, {}).get(name, {}), tops)
        times = f"{slower[2]:.1f} times eager's step at the median, {slower[3]:.1f} at worst"
        yield f"`{name}` alone takes {times} ({shape}: {reason})."


def _shown(row: Row | None) -> str:
    return "" if row is None else f"{row.p50:.3g}"


def speed_part(results: Results, directory: Path) -> Part | None:
    """Steps of one block: speed-ups by shape, and the times behind them."""
    if not results.block:
        return None
    text, figures, lines = [], [], []
    columns = ("eager", OURS, "branches", "moments", "recompute", *COMPILED, "3k", "checkpoint", "conv+bn")
    measured = {row.contender for rows in results.block.values() for row in rows}
    shown = [name for name in columns if name in measured]
    for dtype, rows in results.block.items():
        found = analysis.steps(rows)
        best = analysis.summary(found, OURS, "eager")
        if best:
            text.append(
                f"{dtype}: `{OURS}` is {best[1]:.2f}–{best[3]:.2f} times as fast as the better eager layout over "
                f"{best[0]} shapes, median {best[2]:.2f}."
            )
        layers = {str(shape): shape.name for shape in (*shapes.CPU, *shapes.CUDA)}
        titled = {f"{layers.get(shape, '')}\n{shape}": times for shape, times in found.items()}
        if any(len(times) > 1 for times in found.values() if "eager" in times):
            figures.append(directory / f"speedup-{dtype}.png")
            plots.speedups(titled, f"Training step of one block, {dtype}, {rows[0].device}", figures[-1])
        rates = analysis.steps(rows, "useful_gflop_per_s")
        graphs = analysis.steps(rows, "graph_ms")
        for shape, times in found.items():
            cells = [_shown(times.get(name)) for name in shown]
            quick = f"{times['eager'].p50 / times[OURS].p50:.2f}" if {"eager", OURS} <= times.keys() else ""
            extra = (quick, _shown(rates.get(shape, {}).get(OURS)), _shown(graphs.get(shape, {}).get(OURS)))
            lines.append((shape, dtype, *cells, *extra[: 3 if graphs else 2]))
    header = ["step, ms", "dtype", *shown, f"eager / {OURS}", f"useful GFLOP/s, {OURS}"]
    if any(len(line) > len(header) for line in lines):
        header.append(f"CUDA graph, {OURS}")
    text.append("Each contender in its better layout; useful operations are the taps of the three kernels.")
    return Part("One block", text, Table(tuple(header), lines), figures)


def roofline_part(results: Results, directory: Path) -> Part | None:
    """What steps are made of, against the ceilings."""
    figures, lines = [], []
    for dtype, rows in results.phases.items():
        made_of, tops = analysis.phases(rows), analysis.ceilings(rows)
        if made_of:
            figures.append(directory / f"roofline-{dtype}.png")
            plots.roofline(made_of, tops, f"Phases of a training step, {dtype}, {rows[0].device}", figures[-1])
        totals: dict[str, dict[str, float]] = {}
        for of_shape in made_of.values():
            for contender, phases in of_shape.items():
                for name, phase in phases.items():
                    spent = totals.setdefault(contender, {})
                    spent[name] = spent.get(name, 0) + phase["time_ms"]
        lines += [
            (name, dtype, contender, f"{spent:.4g}", f"{spent / sum(of.values()):.0%}")
            for contender, of in totals.items()
            for name, spent in sorted(of.items(), key=lambda item: -item[1])
            if spent > 0.01 * sum(of.values())
        ]
        lines.append(("ceiling", dtype, "copy", f"{tops['copy']:.4g} GB/s", ""))
        lines.append(("ceiling", dtype, "gemm", f"{tops['gemm']:.4g} GFLOP/s", ""))
    if not figures:
        return None
    text = [
        "Every operator of a channels_last step, timed by itself, operators inside ours too; sums over all shapes."
    ]
    header = ("phase", "dtype", "backend", "ms", "of its backend's steps")
    return Part("What a step is made of", text, Table(header, lines), figures)


def network_part(results: Results, directory: Path) -> Part | None:
    """Steps of whole networks."""
    found = {dtype: analysis.steps(rows) for dtype, rows in results.network.items()}
    if not found:
        return None
    path = directory / "networks.png"
    plots.bars(found, 1.0, "ms a training step", "Training step of whole networks, channels_last", path)
    names = plots.present(times for of in found.values() for times in of.values())
    lines = [
        (network, dtype, *(_shown(times.get(name)) for name in names))
        for dtype, of in found.items()
        for network, times in of.items()
    ]
    return Part("Whole networks", [], Table(("step, ms", "dtype", *names), lines), [path])


def accelerated_part(results: Results, directory: Path) -> Part | None:
    """Steps of other libraries' networks, as they are and accelerated."""
    lines = []
    for dtype, rows in results.accelerated.items():
        kept = analysis.steps(rows, "saved_bytes")
        for network, times in analysis.steps(rows).items():
            if not {"eager", OURS} <= times.keys():
                continue
            faster = f"{times['eager'].p50 / times[OURS].p50:.2f}"
            saved = (f"{kept[network][name].p50 / MIB:.1f}" for name in ("eager", OURS))
            lines.append((network, dtype, *(_shown(times[name]) for name in ("eager", OURS)), faster, *saved))
    if not lines:
        return None
    header = (
        "network",
        "dtype",
        "its own, ms",
        "accelerated, ms",
        "times as fast",
        "saved, MiB",
        "accelerated, MiB",
    )
    text = ["`accelerate(model)` and nothing else; `python -m acnet_kernels bench network --networks timm:NAME …`."]
    return Part("Networks of other libraries", text, Table(header, lines), [])


def memory_part(results: Results, directory: Path) -> Part | None:
    """What training steps of whole networks keep."""
    if not results.memory:
        return None
    saved = {dtype: analysis.steps(rows, "saved_bytes") for dtype, rows in results.memory.items()}
    path = directory / "memory.png"
    plots.bars(saved, MIB, "MiB kept for backward", "Memory of a training step", path)
    lines = []
    for dtype, rows in results.memory.items():
        peaks, batches = analysis.steps(rows, "peak_bytes"), analysis.steps(rows, "largest_batch")
        for network, of in saved[dtype].items():
            for name, row in of.items():
                peak = f"{peaks[network][name].p50 / MIB:.1f}" if name in peaks[network] else "–"
                batch = batches[network][name].p50
                lines.append((network, dtype, name, f"{row.p50 / MIB:.1f}", peak, f"{batch:.0f}"))
    text = [
        "Largest batch: on CUDA what fits the device; on a CPU what keeps no more bytes for backward than the "
        "command's budget (1 GiB unless it says otherwise), from what two batches keep. A compiled network has no "
        "peak on a CPU: its first step's is the compiler's.",
        *_kept_by_blocks(results),
    ]
    header = ("network", "dtype", "contender", "saved, MiB", "peak, MiB", "largest batch")
    return Part("Memory", text, Table(header, lines), [path])


def _kept_by_blocks(results: Results) -> Iterator[str]:
    """A sentence a dtype on what single blocks keep, and how long they take, against eager."""
    for dtype, rows in results.block.items():
        kept, times = analysis.steps(rows, "saved_bytes", "forward"), analysis.steps(rows)
        told = []
        for name in ("moments", "recompute", "checkpoint"):
            found = analysis.summary(kept, "eager", name), analysis.summary(times, "eager", name)
            if found[0] and found[1]:
                told.append(f"`{name}` keeps {found[0][2]:.2f} and takes {found[1][2]:.2f} ({found[0][0]} shapes)")
        if told:
            yield f"Single blocks in {dtype}, medians of shares of eager's bytes and time: {'; '.join(told)}."


def fusion_part(results: Results, directory: Path) -> Part | None:
    """Folding all blocks of a network."""
    rows = next(iter(results.fusion.values()), None)
    if not rows:
        return None
    values = {(row.shape, row.contender, row.metric): row for row in rows}
    lines = [
        (network, contender, f"{row.p50:.3g}", f"{row.p20:.3g}–{row.p80:.3g}", f"{share.p50:.0%}")
        for (network, contender, metric), row in values.items()
        if metric == "time_ms" and (share := values[network, contender, "copy_fraction"])
    ]
    header = ("network", "contender", "ms", "p20–p80", "of a copy's speed")
    return Part("Folding all blocks", ["float32."], Table(header, lines), [])


def change_part(results: Results, before: Results) -> Part | None:
    """What has become slower or faster since the baseline."""
    old = {dtype: analysis.steps(rows) for dtype, rows in before.block.items()}
    found = analysis.changes(old, {dtype: analysis.steps(rows) for dtype, rows in results.block.items()})
    if not found:
        return None
    worse = [change for change in found if change.worse]
    base, limit = next(before.rows), f"{analysis.REGRESSION - 1:.0%}"
    text = [
        f"Baseline: {base.device}, torch {base.torch}, {base.date}. Times are relative to eager's in the same run.",
        f"**{len(worse)} of {len(found)} steps of ours are slower** by more than {limit}, with ranges apart. The "
        "table has those, and the five that changed most either way.",
    ]
    lines = []
    for c in dict.fromkeys([*worse, *found[:5], *found[-5:]]):
        change = (f"{c.before:.3f}", f"{c.now:.3f}", f"{c.now / c.before - 1:+.0%}")
        lines.append((c.shape, c.dtype, c.contender, *change, "slower" if c.worse else ""))
    header = ("step", "dtype", "contender", "before, × eager", "now, × eager", "change", "")
    return Part("Against the baseline", text, Table(header, lines), [])
