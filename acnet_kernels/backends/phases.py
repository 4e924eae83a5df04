"""Which of a step's convolutions Triton runs on CUDA and which the library: one rule, phase by phase.

Triton's kernels compute the convolutions of all branches at once: forward, they leave the batch statistics behind;
backward, they add the branches' dx up. So they move less memory, while the library's multiply faster. Which counts
for more depends on the shape, and is found by measuring: `tune()`, and the planner at first sight of a shape where
cudnn.benchmark is on, time a step under every assignment, and the fastest is kept. Until then all convolutions are
the library's, between Triton's batch-norm passes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.window import MOST_BRANCHES
from ..spec import BRANCH, Problem, Step, problem_of
from ..steps import assignment
from ..steps.assignment import ALL_LIBRARY, LIBRARY, TRITON, Phases, on_device
from . import timing_cache
from .device_info import Machine, this_machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def declines(problem: Problem) -> str | None:
    """Why Triton can run no phase of the problem, or None."""
    if problem.device != assignment.DEVICE:
        return f"its kernels are for {assignment.DEVICE}, not {problem.device}"
    if not assignment.INSTALLED:
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
    return Choice(ALL_LIBRARY, "Triton's phases await measurement: tune()")


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
    if not on_device(x):
        return ALL_LIBRARY
    problem = problem_of(step, x)
    if torch.compiler.is_compiling():
        from . import constants  # slow to import, and only a compiler needs it

        return Phases(*constants.phases_of(*constants.as_constants(problem)))
    return chosen(problem).phases
