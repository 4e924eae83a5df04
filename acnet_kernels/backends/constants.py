"""Choices under a compiler: made as the graph is built, of a problem as constants, and part of it from then on.

Dynamo runs `choice` and `phases_of` as they are and hands them constants alone; nothing in them is guarded. To be
imported only where a compiler is at work: Dynamo and symbolic shapes are slow to import.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value

from ..geometry import Geometry, Taps
from ..spec import Problem
from . import phases, planner

# What a symbolic batch or image size stands for: CIFAR's images, by a few dozen.
USUAL_SIZE = 32

Constants = tuple[tuple[int, ...], int, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]


def as_constants(problem: Problem) -> Constants:
    """The problem in pieces. A graph for every size must not depend on one: a symbolic size is a usual one here."""
    shape = [operator.index(size) if has_static_value(size) else USUAL_SIZE for size in problem.shape]
    placed = problem.geometry.parts()
    branches = tuple([tuple(taps) for taps in problem.branches])
    what = (
        branches,
        problem.convolved,
        problem.normed,
        problem.total,
        problem.batch_stats,
        problem.dtype,
        problem.input_dtype,
    )
    flags = (problem.device, problem.channels_last, problem.grad, problem.synced, problem.transform)
    return (*shape,), problem.out_channels, placed, what, (*flags, problem.weight_dtype)


def from_constants(
    shape: tuple[int, int, int, int],
    out_channels: int,
    placed: tuple[Any, ...],
    what: tuple[Any, ...],
    flags: tuple[Any, ...],
) -> Problem:
    """The problem that these are the pieces of."""
    branches, *rest = what
    return Problem(shape, out_channels, Geometry(*placed), tuple(Taps(*taps) for taps in branches), *rest, *flags)


@torch.compiler.assume_constant_result
def choice(*parts: Any) -> tuple[str, str]:
    """The name of the backend that takes the least time for the problem in these pieces, and why."""
    return planner.decided(from_constants(*parts), False)


@torch.compiler.assume_constant_result
def saver(*parts: Any) -> tuple[str, str]:
    """The name of the backend that needs the least memory for the problem in these pieces, and why."""
    return planner.least(from_constants(*parts))


@torch.compiler.assume_constant_result
def phases_of(*parts: Any) -> tuple[str, ...]:
    """What runs each phase of the problem in these pieces."""
    return tuple(phases.chosen(from_constants(*parts)).phases)
