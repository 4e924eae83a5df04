"""How many milliseconds a backend would take for a step: a linear model of the work it does.

A step's work is counted, not timed: multiply-adds, bytes and calls, by what does them. Each count has a price in
milliseconds, fitted by benchmarks/fit.py to the measured steps of one kind of machine and kept in cost.json:

    time(problem, backend) = Σ price[group][feature] · count[group][feature]

Backends that run the same library convolutions share their prices, so that what the model gets wrong about an odd
convolution it gets wrong for all of them alike, and the choice between them rests on what they do differently.
Groups are told apart by phase, dtype and layout.

Counts, for n branches of k×k, 1×k and k×1 taps over M output pixels, with the passes over maps of a training step
beside the convolutions' own:

    eager      Σ taps convolutions; forward 3n + 3(n−1) passes, backward 5n of the output and 3(n−1) of the input
    branches   the same convolutions; forward 2n + 1, backward 3n + 2 and 2(n−1), in the dtype the y_b are kept in;
               "unfused" on CUDA where Triton does not take the maps: single operators of PyTorch instead
    moments    k² taps, an autocorrelation over (2k−1)²/2 shifts, and its algebra; backward 2k² taps, a correction
               over (2k−1)² shifts

A backend that is not in `COUNTS` has no prediction and is never preferred.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..ops._extension import TRITON
from ..spec import SUM, Problem
from .device_info import CPU, CUDA

Counts = dict[str, dict[str, float]]  # group → feature → how much of it

FORWARD, BACKWARD = PHASES = ("forward", "backward")
PATH = Path(__file__).with_name("cost.json")

# Dtypes that are not measured cost what the one of their width, or half of it, does.
STANDS_FOR = {torch.float16: torch.bfloat16, torch.float64: torch.float32}


LANES = 16  # of a vector of float32


class Prices(NamedTuple):
    """One kind of machine's constants.

    `origin` says where they come from. A backend is preferred to a simpler one where it is predicted to take less
    than 1 / (1 + its margin) of its time, and never where it has no margin: no prediction is sure enough then.
    """

    origin: str
    margins: Mapping[str, float]
    milliseconds: Mapping[str, Mapping[str, float]]


@functools.cache
def prices() -> dict[str, Prices]:
    """Kind of machine → its constants."""
    return {kind: Prices(**entry) for kind, entry in _data()["kinds"].items()}


@functools.cache
def measured() -> dict[str, dict[str, dict[str, float]]]:
    """Device name → problem → backend → milliseconds of a step, for the shapes that the benchmarks run."""
    return _data()["measured"]


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding="utf-8"))


def predict(problem: Problem, backend: str, kind: str) -> float | None:
    """Milliseconds of the step (the forward alone where nothing needs a gradient), or None where not modelled."""
    found = prices().get(kind)
    work = counts(problem, backend, kind)
    return None if found is None or work is None else total(work, found.milliseconds)


def total(work: Counts, milliseconds: Mapping[str, Mapping[str, float]]) -> float | None:
    """What the work costs; None where a group has no prices."""
    if any(group not in milliseconds for group in work):
        return None
    return sum(milliseconds[group].get(f, 0.0) * n for group, features in work.items() for f, n in features.items())


def counts(problem: Problem, backend: str, kind: str, phases: tuple[str, ...] | None = None) -> Counts | None:
    """The work of a step, or of some of its phases; None where the backend has no model."""
    if backend not in COUNTS:
        return None
    if phases is None:
        phases = PHASES if problem.grad else (FORWARD,)
    found: Counts = {}
    for phase in phases:
        for (what, dtype), features in COUNTS[backend](problem, phase, kind).items():
            layout = "channels_last" if problem.channels_last else "nchw"
            stands, width = STANDS_FOR.get(dtype, dtype), dtype.itemsize / STANDS_FOR.get(dtype, dtype).itemsize
            group = f"{what} {phase} {str(stands).removeprefix('torch.')} {layout}"
            found[group] = {feature: n * width for feature, n in features.items()}
    return found


_Groups = dict[tuple[str, torch.dtype], dict[str, float]]  # (what, dtype) → feature → count


def _pixels(problem: Problem) -> int:
    rows, columns = problem.output_size
    return problem.shape[0] * rows * columns


def _map_elements(problem: Problem) -> tuple[int, int]:
    """Elements of the input and of the output."""
    n, c, h, w = problem.shape
    return n * c * h * w, _pixels(problem) * problem.out_channels


def _padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _convolutions(problem: Problem, taps: list[int], dtype: torch.dtype) -> dict[str, float]:
    """One phase of convolutions of so many taps each.

    `gflop` is their arithmetic, `lanes` that of groups (not depthwise) filled up to whole vectors; `outputs` and
    `inputs` are tap × map elements: what cg groups of channels, which leave vectors unfilled, cost beyond it;
    `weights` are read, reordered and written; `gbytes` are maps.
    """
    pixels, k, c = _pixels(problem), problem.out_channels, problem.shape[1]
    cg = c // problem.geometry.groups
    inputs, outputs = _map_elements(problem)
    groups = problem.geometry.groups
    lanes = groups * _padded(cg) * _padded(k // groups) if groups > 1 and cg > 1 else 0
    return {
        "gflop": 2e-9 * sum(taps) * pixels * cg * k,
        "lanes": 2e-9 * sum(taps) * pixels * lanes,
        "outputs": 1e-9 * sum(taps) * pixels * k,
        "inputs": 1e-9 * sum(taps) * pixels * c,
        "weights": 1e-9 * sum(taps) * cg * k * dtype.itemsize,
        "gbytes": 1e-9 * len(taps) * (inputs + outputs) * dtype.itemsize,
    }


def _eager(problem: Problem, phase: str, kind: str) -> _Groups:
    convolutions, norms, dtype = len(problem.branches), len(problem.batch_stats), problem.dtype
    inputs, outputs = _map_elements(problem)
    if phase == FORWARD:
        elements = (3 * norms + 3 * (convolutions - 1)) * outputs
    else:
        elements = 5 * norms * outputs + 3 * (convolutions - 1) * inputs
    return {
        ("convolution", dtype): _convolutions(problem, problem.taps, dtype),
        ("eager", dtype): {"gbytes": 1e-9 * elements * dtype.itemsize, "calls": 2.0 * convolutions + norms - 1},
    }


def _branches(problem: Problem, phase: str, kind: str) -> _Groups:
    dtype = problem.dtype
    if kind == CPU and dtype.itemsize == 2:  # see convolution.convolution_dtype
        dtype = torch.float32
    # The sum of the branches, where one batch norm follows it, is differentiated as one convolution.
    one = problem.norm == SUM and phase == BACKWARD
    taps = [math.prod(problem.geometry.kernel)] if one else problem.taps
    n = len(problem.batch_stats)
    inputs, outputs = _map_elements(problem)
    if phase == FORWARD:
        summed = 3 * (len(taps) - n)  # passes that add the branches up
        nbytes = (2 * n + summed) * outputs * dtype.itemsize + outputs * problem.dtype.itemsize
    else:
        nbytes = (3 * n * outputs + 2 * (n - 1) * inputs) * dtype.itemsize + 2 * outputs * problem.dtype.itemsize
    fused = kind != CUDA or (TRITON and problem.channels_last and problem.dtype != torch.float64)
    return {
        ("convolution", dtype): _convolutions(problem, taps, dtype),
        ("branches" if fused else "unfused", problem.dtype): {"gbytes": 1e-9 * nbytes, "calls": len(taps) + 1.0},
    }


def _moments(problem: Problem, phase: str, kind: str) -> _Groups:
    k, pixels, filters = problem.geometry.kernel[0], _pixels(problem), problem.out_channels
    cg = problem.shape[1] // problem.geometry.groups
    patch = k * k * cg
    inputs, outputs = _map_elements(problem)
    shifts = (2 * k - 1) ** 2
    convolved = k * k if phase == FORWARD else 2 * k * k
    return {
        ("moments", problem.dtype): {
            "gflop": 2e-9 * convolved * pixels * cg * filters,
            "shifts": 1e-9 * shifts * pixels * cg * problem.shape[1],
            "algebra": 2e-9 * filters * patch * patch,
            "gbytes": 1e-9 * (inputs + outputs) * problem.dtype.itemsize,
            "calls": 1.0,
        }
    }


COUNTS: dict[str, Callable[[Problem, str, str], _Groups]] = {
    "eager": _eager,
    "branches": _branches,
    "moments": _moments,
}
