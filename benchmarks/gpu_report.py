"""Tables of a GPU run's rows, however far it came: python -m benchmarks.gpu_report OUT reads and writes there."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import harness
from .ceilings import MODE
from .gpu_suite import CSV, DTYPES, PHASES, SHIFTS
from .harness import Row
from .shapes import Shape

METRICS = ("graph_ms", "time_ms")
PEERS = ("eager", "conv+bn", "3k", "compile", "moments", "recompute")


class Measured(NamedTuple):
    """Contenders' times of one mode on one shape in one dtype: metric → contender → milliseconds."""

    mode: str
    shape: str
    dtype: str
    times: dict[str, dict[str, float]]

    def shown(self, name: str, metric: str = METRICS[0]) -> float | str:
        """The contender's time, '' where it has none."""
        return self.times[metric].get(name, "")

    def fastest(self, among: Callable[[str], bool], metric: str = METRICS[0]) -> str:
        """The name of the fastest of the contenders, '' where none was measured."""
        found = {name: ms for name, ms in self.times[metric].items() if among(name)}
        return min(found, key=found.__getitem__, default="")


def measured(rows: Sequence[Row], of: Callable[[str], bool]) -> list[Measured]:
    """The times of the modes that are wanted, in the order of the rows."""
    found: dict[tuple[str, str, str], Measured] = {}
    for row in rows:
        if row.metric in METRICS and of(row.mode):
            key = row.mode, row.shape, row.dtype
            group = found.setdefault(key, Measured(*key, {metric: {} for metric in METRICS}))
            group.times[row.metric][row.contender] = row.p50
    return list(found.values())


def ratio(a: Any, b: Any) -> float | str:
    """a / b, '' where either was not measured."""
    return a / b if isinstance(a, float) and isinstance(b, float) and b else ""


def best_rate(phase: Measured, tops: dict[tuple[str, str], float]) -> float | str:
    """The share of the ceiling that Triton reaches by the device's time, '' where one is missing."""
    spent, shape = phase.shown("triton"), Shape.parse(phase.shape)
    maps = shape.batch * shape.out_channels * shape.height * shape.width
    moved = {"batch norms": 7}.get(phase.mode, 4 if phase.mode.startswith("depthwise") else 0)
    if moved:  # by memory
        done, top = moved * maps * DTYPES[phase.dtype].itemsize, tops.get(("copy", phase.dtype))
    else:
        taps = len(SHIFTS) if phase.mode == "second moments" else 15
        done, top = 2 * taps * maps * shape.channels, tops.get(("gemm", phase.dtype))
    return ratio(done / spent / 1e6 if isinstance(spent, float) and spent else "", top)


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """(title, header, lines) of every table that there are rows for."""
    outcomes = Counter((row.contender.partition("::")[0], row.mode) for row in rows if row.metric == "seconds")
    kinds = ("passed", "failed", "skipped")
    files = dict.fromkeys(file for file, _ in outcomes)
    yield "Tests", ("file", *kinds), [(file, *(outcomes[file, kind] for kind in kinds)) for file in files]
    failed = [(row.contender,) for row in rows if row.metric == "seconds" and row.mode == "failed"]
    yield "Tests that failed", ("test",), failed
    off = [row for row in rows if row.metric == "error_over_allowed"]
    wrong = [(row.shape, row.dtype, row.p50) for row in off if not row.p50 <= 1]
    yield f"Equivalence: {len(wrong)} of {len(off)} at fault", ("problem", "dtype", "error / allowed"), wrong
    died = [(row.contender, row.mode, row.shape, row.dtype) for row in rows if row.metric == "failed"]
    yield "Contenders that failed", ("contender", "mode", "shape", "dtype"), died
    cache = [(row.metric, row.p50) for row in rows if row.contender == "triton cache"]
    yield "Triton's cache", ("what", "kernels"), cache

    tops = {(row.contender, row.dtype): row.p50 for row in rows if row.mode == MODE}
    yield "Ceilings", ("what", "dtype", "GB/s or GFLOP/s"), [(*key, rate) for key, rate in tops.items()]
    header = ("shape", "dtype", "phase", "library", "triton", "library / triton", "of ceiling")
    phases = measured(rows, lambda mode: mode.removeprefix("depthwise ") in PHASES)
    lines = []
    for m in phases:
        a, b = m.shown("library"), m.shown("triton")
        walls = (m.shown("library", "time_ms"), m.shown("triton", "time_ms"))
        lines.append((m.shape, m.dtype, m.mode, a, b, ratio(a, b), best_rate(m, tops), *walls))
    yield "Phases, ms of device time; last with launches", (*header, "library", "triton"), lines

    for metric, title in zip(METRICS, ("device time", "with launches"), strict=True):
        lines = []
        for m in measured(rows, lambda mode: mode == "block step"):
            best = m.fastest(lambda name: name.startswith("branches ("), metric)
            library = m.shown("branches (library library library)", metric)
            ours = (library, best.removeprefix("branches "), m.shown(best, metric))
            gain = ratio(m.shown("eager", metric), m.shown(best, metric))
            lines.append((m.shape, m.dtype, *(m.shown(name, metric) for name in PEERS), *ours, gain))
        header = ("shape", "dtype", *PEERS, "branches, all the library's", "best assignment", "its", "eager / best")
        yield f"A block's step, ms, {title}", header, lines

    names = ("plain", "eager", "auto")
    lines = [
        (m.shape, m.dtype, *(m.shown(name, metric) for metric in METRICS for name in names))
        for m in measured(rows, lambda mode: mode == "training step")
    ]
    header = ("network", "dtype", *names, *(f"{name}, launched" for name in names))
    yield "Training steps, ms of device time, then with launches", header, lines
    folds: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.mode in ("fresh", "out") and row.metric == "time_ms":
            folds[row.shape][row.contender] = row.p50
    names = tuple(dict.fromkeys(name for times in folds.values() for name in times))
    lines = [(network, *(times.get(name, "") for name in names)) for network, times in folds.items()]
    yield "Folding a network, ms", ("network", *names), lines

    lines = []
    for m in measured(rows, lambda mode: mode.endswith("configuration")):
        chosen, best = m.fastest(lambda name: name.endswith("chosen")), m.fastest(lambda name: True)
        lines.append((m.shape, m.dtype, m.mode, chosen, m.shown(chosen), best, m.shown(best)))
    header = ("shape", "dtype", "kernel", "chosen", "its ms", "best", "its ms")
    yield "Configurations, device time", header, lines


def write(out: Path) -> str:
    """Writes gpu_suite.md from the CSV beside it, and returns its text."""
    rows = harness.read_csv(out / CSV) if (out / CSV).exists() else []
    text = ["# GPU suite: " + ("; ".join(dict.fromkeys(_where(row) for row in rows)) or "no rows")]
    for title, header, lines in sections(rows):
        if lines:
            text += [f"## {title}", harness.table(header, lines)]
        elif title.startswith("Equivalence"):
            text.append(f"## {title}")
    whole = "\n\n".join(text) + "\n"
    (out / "gpu_suite.md").write_text(whole, encoding="utf-8")
    return whole


def _where(row: Row) -> str:
    return f"{row.device}, torch {row.torch}, Triton {row.triton}, driver {row.driver or 'unknown'}, {row.date}"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
