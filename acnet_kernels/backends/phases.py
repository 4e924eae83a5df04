"""Which of a step's convolutions Triton runs on CUDA and which the library: one rule, phase by phase.

Triton's kernels compute the convolutions of all branches at once: forward, they leave the batch statistics behind;
backward, they add the branches' dx up. So they move less memory, while the library's multiply faster. Which counts
for more depends on the shape, and is found by measuring: `tune()`, and the planner at first sight of a shape where
cudnn.benchmark is on, time a step under every assignment, and the fastest is kept. Until then all convolutions are
the library's, between Triton's batch-norm passes. What a model for an H100's peak rates predicts is only said:

    a launch takes max(its multiply-adds, its bytes) and LAUNCH seconds; n branches, M pixels of output
    phase    library                                            Triton
    forward  n convolutions; statistics n, apply n+1 maps      one launch: x, n maps; apply n+1 maps
    dgrad    n convolutions, n−1 additions of 3 input maps     one launch: n maps, dx
    wgrad    n convolutions                                    one launch and a sum: x, n maps

A convolution of the library's moves x and y. Triton's multiply-adds are taken to be at SHARE of the library's rate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.window import MOST_BRANCHES
from ..ops._extension import TRITON as INSTALLED
from ..spec import BRANCH, Problem, Step, problem_of
from . import timing_cache
from .device_info import Machine, this_machine

LIBRARY, TRITON = "library", "triton"
DEVICE = "cuda"  # what the kernels are for


class Phases(NamedTuple):
    """What runs each phase: LIBRARY or TRITON."""

    forward: str
    dgrad: str
    wgrad: str


ALL_LIBRARY, ALL_TRITON = Phases(LIBRARY, LIBRARY, LIBRARY), Phases(TRITON, TRITON, TRITON)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Multiply-adds count as two operations. Sustained rates, not the data sheet's.
TENSOR_FLOPS = 500e12  # half precision; TF32 has half of it
VECTOR_FLOPS = 40e12
BANDWIDTH = 2.7e12
LAUNCH = 8e-6
SHARE = 0.7
LEAST_BLOCK = 16  # channels of the narrowest tile of a matrix product


def declines(problem: Problem) -> str | None:
    """Why Triton can run no phase of the problem, or None."""
    if problem.device != DEVICE:
        return f"its kernels are for {DEVICE}, not {problem.device}"
    if not INSTALLED:
        return "it is not installed"
    if problem.norm != BRANCH:
        return "not every branch has a batch norm of its own alone"
    if not all(problem.convolved):
        return "a branch is the identity"
    if len(problem.branches) > MOST_BRANCHES:
        return f"it adds up {MOST_BRANCHES} branches at most in one kernel, not {len(problem.branches)}"
    if problem.dtype not in DTYPES:
        return f"it has no kernels for {problem.dtype}"
    if not problem.channels_last:
        return "the maps are not channels_last"
    return None


def assignments(problem: Problem) -> list[Phases]:
    """Every assignment that the problem can run under, all of the library's first."""
    if declines(problem) is not None:
        return [ALL_LIBRARY]
    backward = (LIBRARY, TRITON) if problem.grad else (LIBRARY,)
    return list(itertools.starmap(Phases, itertools.product((LIBRARY, TRITON), backward, backward)))


def label(phases: Phases) -> str:
    """The name that the time of a step under this assignment is filed under, beside those of the backends."""
    return f"branches ({' '.join(phases)})"


def predict(problem: Problem) -> dict[str, dict[str, float]]:
    """Phase that runs → LIBRARY and TRITON → milliseconds, by the model above."""
    geometry, branches = problem.geometry, len(problem.branches)
    n, c, *_ = problem.shape
    rows, columns = problem.output_size
    cg, wide = c // geometry.groups, problem.out_channels // geometry.groups
    rate = VECTOR_FLOPS
    if cg > 1:
        cg, wide = max(cg, LEAST_BLOCK), max(wide, LEAST_BLOCK)
        rate = TENSOR_FLOPS if problem.dtype.itemsize == 2 else TENSOR_FLOPS / 2
    tap = 2 * n * rows * columns * geometry.groups * cg * wide / rate
    taps = problem.taps
    x, y = problem.input_bytes / BANDWIDTH, problem.output_bytes / BANDWIDTH

    convolutions = sum(max(t * tap, x + y) for t in taps)
    at_once = max(sum(taps) * tap / SHARE, x + branches * y)
    apply = (branches + 1) * y
    seconds = {
        "forward": (convolutions + branches * y + apply + (branches + 3) * LAUNCH, at_once + apply + 3 * LAUNCH),
        "dgrad": (convolutions + (branches - 1) * 3 * x + (2 * branches - 1) * LAUNCH, at_once + LAUNCH),
        "wgrad": (convolutions + branches * LAUNCH, at_once + 2 * LAUNCH),
    }
    running = seconds if problem.grad else ("forward",)
    return {
        phase: dict(zip((LIBRARY, TRITON), (1e3 * t for t in seconds[phase]), strict=True)) for phase in running
    }


def predicted_best(problem: Problem) -> Phases:
    """The assignment that the model predicts to take the least time."""
    faster = {phase: TRITON for phase, t in predict(problem).items() if t[TRITON] < t[LIBRARY]}
    return ALL_LIBRARY if declines(problem) is not None else ALL_LIBRARY._replace(**faster)


class Choice(NamedTuple):
    """The assignment, and why; str() is for people."""

    phases: Phases
    why: str

    def __str__(self) -> str:
        assigned = ", ".join(f"{phase} by {who}" for phase, who in self.phases._asdict().items())
        return f"{assigned} ({self.why})"


def choose(problem: Problem, measured: Mapping[str, float]) -> Choice:
    """What runs each phase of the problem, and why: the whole rule.

    Args:
        problem: as the backend sees it, its padding explicit where the mode is not zeros.
        measured: backend, or `label` of an assignment → milliseconds of a step, as far as measured.
    """
    why = declines(problem)
    if why is not None:
        return Choice(ALL_LIBRARY, f"no phase is Triton's: {why}")
    timed = {phases: measured[label(phases)] for phases in assignments(problem) if label(phases) in measured}
    if timed:
        best = min(timed, key=timed.__getitem__)
        return Choice(best, f"measured {timed[best]:.3g} ms a step, other assignments to {max(timed.values()):.3g}")
    times = ", ".join(f"{phase} {t[LIBRARY]:.2g} and {t[TRITON]:.2g}" for phase, t in predict(problem).items())
    return Choice(
        ALL_LIBRARY, f"Triton's phases await measurement; predicted, in ms by library and Triton: {times}"
    )


def chosen(problem: Problem) -> Choice:
    """choose() by what is known now about times on this machine."""
    if declines(problem) is not None:
        return choose(problem, {})
    return _decided(problem, this_machine(problem.device), timing_cache.version())


@functools.lru_cache(4096)
def _decided(problem: Problem, machine: Machine, version: int) -> Choice:
    known = timing_cache.lookup(problem, machine)
    return choose(problem, known.milliseconds if known else {})


def phases_of(step: Step, x: Tensor) -> Phases:
    """What runs each phase of this step; x is padded already where the padding mode is not zeros."""
    if x.device.type != DEVICE or not INSTALLED:
        return ALL_LIBRARY
    problem = problem_of(step, x)
    if torch.compiler.is_compiling():
        from . import constants  # slow to import, and only a compiler needs it

        return Phases(*constants.phases_of(*constants.as_constants(problem)))
    return chosen(problem).phases
