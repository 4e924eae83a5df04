"""`moments` where every channel is a group of its own: one pass over the maps, whatever the number of branches.

A channel's batch statistics are a quadratic form in its patches' second moments, 13 sums for a 3×3 kernel. So the
step is one reading of x for the moments, one convolution, one weight gradient, and one input gradient whose stencil
includes the statistics' share: dx = Wᵀ * g − B * x + what the constants leave, B of (2k−1)² taps, with a table of
its own for every kind of border pixel. Any stride, dilation and zero padding (docs/depthwise.md).

The operators are in steps/depthwise.py.
"""

from __future__ import annotations

import math

import torch

from ..geometry import Geometry
from ..ops._extension import LOADED
from ..spec import MIXED, Problem, Step
from ..steps import depthwise as ops
from . import mixed

DEVICES = ("cpu", "cuda")  # that have kernels of these operators
CUDA_PROGRAMS = 1024  # that share a pass over the maps, about


def computes(geometry: Geometry, channels: int, out_channels: int, device: str, dtype: torch.dtype) -> bool:
    """Whether these operators compute steps of this geometry; on CUDA, where they have fast kernels."""
    return (
        geometry.groups == channels
        and (device != "cuda" or ops.triton_declines(dtype, geometry.kernel, geometry.stride) is None)
        and max(geometry.kernel) <= ops.MOST_TAPS
        and max(geometry.padding) <= ops.MOST_PADDING
        and out_channels <= ops.MOST_MULTIPLIER * channels
    )


def takes(problem: Problem) -> bool:
    """computes() of a problem."""
    shape, device = problem.shape, problem.device
    return computes(problem.geometry, shape[1], problem.out_channels, device, problem.dtype)


def nests(problem: Problem) -> bool:
    """Whether the operators compute the batch norm after a sum of which some branches have their own, too.

    (Where an ε is 0 they do not; it is rare, and not known of a problem.)
    """
    return problem.norm == MIXED and problem.total and problem.device in DEVICES and takes(problem)


def is_nested(step: Step, device: str) -> bool:
    """Whether a depthwise step is one of nested batch norms that the operators take as a whole."""
    own = any(branch.norm is not None for branch in step.branches)
    return step.norm is not None and own and device in DEVICES and all(norm.eps > 0 for norm in step.norms)


def finishes(problem: Problem) -> bool:
    """Whether the passes compute what follows the sum, too."""
    return _is_fast(problem) and (problem.norm != MIXED or nests(problem))


def is_fastest(problem: Problem) -> bool:
    """Whether no other way to compute the problem is as fast, wherever this one computes it: on a CPU, in C++.

    On CUDA that is predicted, by the memory that is moved (docs/depthwise.md). A branch alone has nothing to share
    its passes with.
    """
    return _is_fast(problem) and (nests(problem) or len(mixed.inner(problem).branches) > 1)


def _is_fast(problem: Problem) -> bool:
    return (LOADED if problem.device == "cpu" else problem.device == "cuda") and takes(problem)


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for backward: x, padded where it must be, and some numbers for each tap and each batch norm."""
    problem = problem.explicit()
    taps, norms = math.prod(problem.geometry.kernel), len(problem.batch_stats)
    numbers = taps if problem.total else 0
    for own, convolved, normed in zip(problem.branches, problem.convolved, problem.normed, strict=True):
        if normed:
            numbers += own.rows * own.columns if convolved else 1
    wide = torch.promote_types(problem.dtype, torch.float32).itemsize
    per_output = 2 * 8 * norms + wide * numbers
    return problem.input_bytes + problem.shape[1] * 8 * (1 + taps) + problem.out_channels * per_output


def transient_bytes(problem: Problem) -> int:
    """Bytes that a step holds at most besides what it keeps, its output and its gradients among them."""
    problem = problem.explicit()
    rows, columns = problem.geometry.kernel
    taps, channels = rows * columns, problem.shape[1]
    kinds = (2 * rows - 1) * (2 * columns - 1)  # of pixels, about
    numbers = kinds // 2 + 2
    tasks = 1  # a channel's, which leave their sums behind
    if problem.device == "cuda":
        tasks = CUDA_PROGRAMS * (min(64, channels) if problem.channels_last else 1) // channels
    sums = 8 * channels * numbers * (kinds + tasks)
    forward = problem.output_bytes + sums
    if not problem.grad:
        return forward
    backward = 8 * channels * (taps + 1) * taps
    if problem.device == "cuda":
        backward += 8 * problem.out_channels * (taps + 1) * tasks + 4 * channels * taps * 2 * numbers
    return max(forward, problem.input_bytes + backward)
