"""Fits the planner's cost model to the committed measurements of blocks, and says how well it chooses.

    python -m benchmarks.fit [--results DIR …] [--write FILE]

Reads every block-*.csv in and below the directories (all of benchmarks/results). Of a device measured in several
runs, each time is the median of theirs: now and then a contender has bad luck for a whole run. Fits the prices of
the cost model by non-negative least squares of relative errors, one system a layout, and writes
acnet_kernels/backends/cost.json: prices by kind of machine, and the measured times of every shape by device. Kinds
that nothing is measured on get predicted prices.

Prints each shape's measured and predicted times, the choice, and its regret: how much longer the chosen backend
takes than the fastest in the same layout. 'unseen' is the regret of prices fitted without the shape; the margins by
which a backend must be faster than a simpler one are chosen by it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from acnet_kernels import ACBlock
from acnet_kernels.backends import cost, eager, planner, timing_cache
from acnet_kernels.backends.device_info import CPU, CUDA, FAST_HALF_CPU
from acnet_kernels.functional import describe
from acnet_kernels.spec import Problem

from . import harness
from .shapes import Shape

RESULTS = Path(__file__).parent / "results"
MARGINS = (0.5, 0.3, 0.2, 0.15, 0.1, 0.08, 0.05, 0.03, 0.02)

Prices = Mapping[str, Mapping[str, float]]


@dataclass
class Case:
    """One shape in one dtype and layout on one device: (backend, mode) → median milliseconds."""

    problem: Problem
    shape: str
    milliseconds: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def steps(self) -> dict[str, float]:
        """Backend → milliseconds of a step."""
        return {backend: ms for (backend, mode), ms in self.milliseconds.items() if mode == "step"}

    def predicted(self, prices: Prices, kind: str) -> dict[str, float]:
        """Backend → predicted milliseconds of a step, of those that were measured."""
        found = {}
        for backend in self.steps:
            work = cost.counts(self.problem, backend, kind)
            ms = None if work is None else cost.total(work, prices)
            if ms is not None:
                found[backend] = ms
        return found

    def regret(self, backend: str) -> float:
        """How much longer the backend takes than the fastest, as a fraction."""
        return self.steps[backend] / min(self.steps.values()) - 1

    def loss(self, backend: str) -> float:
        """How much longer the backend takes than eager, as a fraction."""
        return self.steps[backend] / self.steps[eager.NAME] - 1


@functools.cache
def problem_of(shape: str, dtype: str, layout: str, device: str) -> Problem:
    """The problem that a row's contenders compute."""
    s = Shape.parse(shape)
    block = ACBlock(s.channels, s.out_channels, s.kernel, s.stride, s.padding, s.dilation, s.groups, device="meta")
    step = block.step()
    problem = describe(torch.empty(s.in_shape, device="meta"), step)
    computed = getattr(torch, dtype)
    return replace(
        problem, device=device, dtype=computed, input_dtype=computed, channels_last=layout == "channels_last"
    )


def read(paths: Iterable[Path]) -> dict[str, list[harness.Row]]:
    """Device → its rows with the time of a backend's step or forward."""
    found: dict[str, list[harness.Row]] = collections.defaultdict(list)
    for path in paths:
        for row in harness.read_csv(path):
            if row.metric == "time_ms" and row.mode in ("step", "forward") and row.contender in planner.BACKENDS:
                found[row.device].append(row)
    return dict(found)


def cases_of(rows: Sequence[harness.Row]) -> list[Case]:
    """The rows by shape, dtype and layout, medians over runs.

    Times of a backend that declines the step are another's, and dropped.
    """
    cases: dict[tuple[str, str, str], Case] = {}
    runs: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)
    for row in rows:
        runs[row.shape, row.dtype, row.layout, row.contender, row.mode].append(row.p50)
    device = "cuda" if rows[0].cudnn else "cpu"
    for row in rows:
        problem = problem_of(row.shape, row.dtype, row.layout, device)
        case = cases.setdefault((row.shape, row.dtype, row.layout), Case(problem, row.shape))
        if planner.BACKENDS[row.contender].declines(problem) is None:
            taken = runs[row.shape, row.dtype, row.layout, row.contender, row.mode]
            case.milliseconds[row.contender, row.mode] = statistics.median(taken)
    return [case for case in cases.values() if eager.NAME in case.steps]


def kind_of(rows: Sequence[harness.Row]) -> str:
    """The kind of machine, from its rows: a CPU's bfloat16 is fast where eager steps of it are, all together."""
    if rows[0].cudnn:
        return CUDA
    took: dict[str, dict[tuple[str, str], float]] = collections.defaultdict(dict)
    for row in rows:
        if (row.contender, row.mode) == (eager.NAME, "step"):
            took[row.dtype][row.shape, row.layout] = row.p50
    full, half = took["float32"], took["bfloat16"]
    shared = full.keys() & half.keys()
    return FAST_HALF_CPU if sum(half[k] for k in shared) < sum(full[k] for k in shared) else CPU


def fit(cases: Sequence[Case], kind: str) -> dict[str, dict[str, float]]:
    """Group → feature → milliseconds: the prices with the least squares of relative errors over all cases."""
    prices: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for channels_last in (False, True):
        works, times = [], []
        for case in cases:
            if case.problem.channels_last != channels_last:
                continue
            for (backend, mode), ms in case.milliseconds.items():
                work = cost.counts(case.problem, backend, kind, cost.PHASES if mode == "step" else (cost.FORWARD,))
                if work is not None:
                    works.append(work)
                    times.append(ms)
        slots = sorted({(group, name) for work in works for group, features in work.items() for name in features})
        if not slots:
            continue
        relative = (
            np.array([[w.get(g, {}).get(f, 0.0) for g, f in slots] for w in works]) / np.array(times)[:, None]
        )
        scale = np.maximum(np.linalg.norm(relative, axis=0), 1e-30)
        found = non_negative_least_squares(relative / scale, np.ones(len(times))) / scale
        for (group, name), price in zip(slots, found, strict=True):
            prices[group][name] = float(f"{price:.5g}")
    return dict(prices)


def non_negative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x ≥ 0 with the least ‖a·x − b‖, by the active sets of Lawson and Hanson (1974, chapter 23)."""
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(10 * a.shape[1]):
        gradient = a.T @ (b - a @ x)
        gradient[free] = -np.inf
        if gradient.max() < 1e-9:
            break
        free[gradient.argmax()] = True
        while True:
            goal = np.zeros_like(x)
            goal[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            stuck = free & (goal <= 0)
            if not stuck.any():
                break
            x += (x[stuck] / (x[stuck] - goal[stuck])).min() * (goal - x)  # as far as the first that comes to zero
            free &= x > 1e-12
            x[~free] = 0
        x = goal
    return x


def without_each_shape(cases: Sequence[Case], kind: str) -> dict[str, dict[str, dict[str, float]]]:
    """Shape → prices fitted to all the others."""
    return {shape: fit([c for c in cases if c.shape != shape], kind) for shape in {c.shape for c in cases}}


def choices(
    cases: Sequence[Case], prices: Callable[[Case], Prices], kind: str, margins: Mapping[str, float]
) -> list[str]:
    """What prediction alone would choose for each case."""
    found = []
    for case in cases:
        predicted = case.predicted(prices(case), kind)
        found.append(planner.fastest(predicted, margins) if eager.NAME in predicted else eager.NAME)
    return found


def best_margins(cases: Sequence[Case], unseen: Mapping[str, Prices], kind: str) -> dict[str, float]:
    """Backend → margin, of those that gain by prediction on unseen shapes; the most cautious of equals.

    One backend after the other, each by the mean regret; what is lost against eager counts twice.
    """
    margins: dict[str, float] = {}

    def key(tried: Mapping[str, float]) -> float:
        chosen = choices(cases, lambda case: unseen[case.shape], kind, tried)
        pairs = zip(cases, chosen, strict=True)
        return round(sum(case.regret(name) + max(case.loss(name), 0) for case, name in pairs), 6)

    for name in planner.BACKENDS:
        if name != eager.NAME and name in cost.COUNTS:
            margins = min([margins, *({**margins, name: margin} for margin in MARGINS)], key=key)
    return margins


# What design figures say of kinds that nothing is measured on.
ACCELERATOR = {"gflop/s": {"float32": 250e3, "bfloat16": 500e3}, "gbyte/s": 2700.0, "call ms": 8e-3}
CUDA_MARGINS = {"branches": 0.1}  # what a prediction must say for Triton's passes to stand between the convolutions
UNFUSED = 3  # passes of single operators for one fused pass
FAST_HALF_GAIN = 0.35  # of float32's time that bfloat16 convolutions take on matrix units


def predicted_cuda() -> dict[str, dict[str, float]]:
    """Prices of an H100 whose convolutions reach half its peak, and whose passes all of its bandwidth."""
    prices = {}
    byte, call = 1e3 / ACCELERATOR["gbyte/s"], ACCELERATOR["call ms"]
    for dtype, rate in ACCELERATOR["gflop/s"].items():
        flop = 1e3 / rate
        for layout in ("nchw", "channels_last"):
            for phase, times in ((cost.FORWARD, 1), (cost.BACKWARD, 2)):  # backward: two convolutions for each
                suffix = f"{phase} {dtype} {layout}"
                prices[f"convolution {suffix}"] = {"gflop": times * flop, "gbytes": times * byte}
                for what, passes in (("eager", 1), ("branches", 1), ("unfused", UNFUSED)):
                    prices[f"{what} {suffix}"] = {"gbytes": passes * byte, "calls": passes * call}
                # 3 passes forward, 9 backward, of input and output size; the correction convolves all shifts.
                prices[f"moments {suffix}"] = {
                    "gflop": flop,
                    "shifts": times * flop,
                    "gbytes": (1.5 if phase == cost.FORWARD else 4.5) * byte,
                    "calls": 12 * call,
                }
    return prices


def predicted_fast_half(measured: Prices) -> dict[str, dict[str, float]]:
    """A CPU's prices, with bfloat16 convolutions at a fraction of its float32 ones'."""
    prices = {group: dict(features) for group, features in measured.items()}
    for group, features in measured.items():
        if group.startswith("convolution ") and " float32 " in group:
            half = {name: FAST_HALF_GAIN * price for name, price in features.items()}
            prices[group.replace(" float32 ", " bfloat16 ")] = half
    return prices


def best_of(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Problem → backend → milliseconds of a step, as the planner looks them up."""
    return {
        timing_cache.key(case.problem): {name: float(f"{ms:.5g}") for name, ms in case.steps.items()}
        for case in cases
    }


def judge(
    cases: Sequence[Case], kind: str, margins: Mapping[str, float], prices: Prices, unseen: Mapping[str, Prices]
) -> str:
    """The table of a device: measured and predicted times, choices and regrets."""
    seen = choices(cases, lambda case: prices, kind, margins)
    blind = choices(cases, lambda case: unseen[case.shape], kind, margins)
    backends = [name for name in planner.BACKENDS if any(name in case.steps for case in cases)]
    lines = []
    for case, name, other in zip(cases, seen, blind, strict=True):
        predicted = case.predicted(prices, kind)
        cells = (
            f"{case.steps[b]:.3g} ({predicted.get(b, float('nan')):.3g})" if b in case.steps else ""
            for b in backends
        )
        what = timing_cache.key(case.problem).removeprefix("step ")
        lines.append((what, *cells, name, f"{case.regret(name):.1%}", f"{case.regret(other):.1%}"))
    header = ("step", *(f"{name}, ms (predicted)" for name in backends), "chosen", "regret", "unseen")
    rows = [harness.table(header, lines)]
    for label, chosen in (
        ("model", seen),
        ("model, unseen shapes", blind),
        ("with measured times", measured_choices(cases)),
    ):
        regrets = [case.regret(name) for case, name in zip(cases, chosen, strict=True)]
        losses = [case.loss(name) for case, name in zip(cases, chosen, strict=True)]
        rows.append(
            f"{label}: regret {np.mean(regrets):.1%} on average, {max(regrets):.1%} at worst; "
            f"against eager {max(losses):+.1%} at worst"
        )
    return "\n".join(rows)


def measured_choices(cases: Sequence[Case]) -> list[str]:
    """What the planner chooses where it knows the measured times."""
    return [planner.fastest(case.steps, planner.MEASURED_MARGINS) for case in cases]


def fitted(paths: Iterable[Path], say: Callable[[str], None] = lambda text: None) -> dict:
    """The content of cost.json."""
    kinds: dict[str, dict] = {}
    measured = {}
    devices = read(paths)
    for device, rows in sorted(devices.items(), key=lambda item: -len(item[1])):
        cases, kind = cases_of(rows), kind_of(rows)
        measured[device] = best_of(cases)
        if kind in kinds:  # of several machines of a kind, the one with the most measurements
            continue
        prices, unseen = fit(cases, kind), without_each_shape(cases, kind)
        margins = best_margins(cases, unseen, kind)
        origin = f"measured on {device}, torch {rows[0].torch}, {rows[0].date}"
        kinds[kind] = {"origin": origin, "margins": margins, "milliseconds": prices}
        say(f"\n{kind}: {origin}; margins {margins}\n\n{judge(cases, kind, margins, prices, unseen)}")
        missing = {row.contender for row in rows} - set(cost.COUNTS) - {"folded"}
        if missing:
            say(f"without a model, so never predicted: {', '.join(sorted(missing))}")
    if CPU in kinds and FAST_HALF_CPU not in kinds:
        kinds[FAST_HALF_CPU] = {
            "origin": f"predicted, from {kinds[CPU]['origin']}, with bfloat16 convolutions on matrix units",
            "margins": {name: 2 * margin for name, margin in kinds[CPU]["margins"].items()},
            "milliseconds": predicted_fast_half(kinds[CPU]["milliseconds"]),
        }
    if CUDA not in kinds:
        kinds[CUDA] = {
            "origin": "predicted for an H100 from peak rates, not measured",
            "margins": CUDA_MARGINS,
            "milliseconds": predicted_cuda(),
        }
    return {"kinds": kinds, "measured": measured}


def csv_files(results: Iterable[Path]) -> list[Path]:
    """The files with blocks' times in and below the directories, in order."""
    return sorted({path for directory in results for path in directory.rglob("block-*.csv")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", type=Path, default=[RESULTS])
    parser.add_argument("--write", type=Path, default=cost.PATH)
    options = parser.parse_args()
    paths = csv_files(options.results)
    if not paths:
        parser.error(f"--results must hold block-*.csv files, found none in {', '.join(map(str, options.results))}")
    content = fitted(paths, print)
    options.write.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"\nwritten: {options.write}")


if __name__ == "__main__":
    main()
