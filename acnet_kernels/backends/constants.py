"""A problem as constants, which is all that Dynamo hands to a function whose answer becomes part of the graph."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx.experimental.symbolic_shapes import has_static_value

from ..geometry import Geometry
from ..spec import Problem

# What a symbolic batch or image size stands for: CIFAR's images, by a few dozen.
USUAL_SIZE = 32

Pieces = tuple[tuple[int, ...], int, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]


def pieces(problem: Problem) -> Pieces:
    """The problem in pieces. A graph for every size must not depend on one: a symbolic size is a usual one here."""
    shape = [operator.index(size) if has_static_value(size) else USUAL_SIZE for size in problem.shape]
    g = problem.geometry
    placed = (g.kernel, g.stride, g.padding, g.dilation, g.groups, g.padding_mode, g.shift)
    what = (problem.branches, problem.norm, problem.batch_stats, problem.dtype, problem.input_dtype)
    return (*shape,), problem.out_channels, placed, what, (problem.device, problem.channels_last, problem.grad)


def whole(
    shape: tuple[int, int, int, int],
    out_channels: int,
    placed: tuple[Any, ...],
    what: tuple[Any, ...],
    flags: tuple[Any, ...],
) -> Problem:
    """The problem that these are the pieces of."""
    return Problem(shape, out_channels, Geometry(*placed), *what, *flags)
