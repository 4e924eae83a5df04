"""Batch statistics from the input's autocorrelation: one k×k convolution a step, and only x kept for backward.

Forward: the second moments of x's patches (steps/moments_algebra.py) give every branch's mean and variance before
any output exists, so the output is one convolution with the fused weights. Backward: with A = Σ_p g[p]·P_pᵀ,

    dγ_b = rstd_b·(⟨W̃_b, A⟩ − μ_b·Σg)     dβ_b = Σg     c_b = dγ_b/M     ḡ = Σg/M
    dW_b = s_b·(A − ḡ·S − c_b·rstd_b·(W̃_b·G − μ_b·S)) on b's own taps
    dx   = dgrad(g, Σ s_b·W̃_b) − Σ_b W̃ᵀ_b * (s_b·c_b·rstd_b·(W̃_b * x)) + what the constants leave

Exactly three batch norms' training semantics; no map but x is kept, and no batch-norm pass over a map exists.
Where every channel is a group of its own, moments_depthwise.py computes the same in passes of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops._extension import LOADED
from ..spec import NOTHING, SUM, Epilogue, Problem, Step
from ..steps import moments_algebra as algebra
from ..steps.convolution import convolution_dtype
from ..steps.moments_passes import CHUNK_BYTES, LEAST_CHANNELS_BY_BRANCH
from . import mixed, whole
from . import moments_depthwise as depthwise

NAME = "moments"


def declines(problem: Problem) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    geometry = problem.geometry
    if not all(problem.batch_stats):
        return "a batch norm normalises by its running statistics"
    if not problem.dtype.is_floating_point:
        return f"dtype {problem.dtype} is not a float"
    if depthwise.takes(problem):
        return mixed.declines(problem)
    if geometry.padding_mode != "zeros":
        return f"padding_mode {geometry.padding_mode!r} is not 'zeros'"
    if geometry.kernel[0] != geometry.kernel[1] or geometry.kernel[0] % 2 == 0:
        return f"kernel_size {geometry.kernel} is not one odd number twice, for which the identities hold"
    for name, value, wanted in (
        ("stride", geometry.stride, (1, 1)),
        ("dilation", geometry.dilation, (1, 1)),
        ("padding", geometry.padding, (geometry.kernel[0] // 2,) * 2),
    ):
        if value != wanted:
            return f"{name} {value} is not {wanted}, for which the identities hold"
    return mixed.declines(problem)


# On a CPU, of dense 1×1 blocks of four convolutions: of 48 channels of 8×28² or 8×56² it takes 0.6 of the time that
# `branches` takes, of 16 half; of 64 as much, of 128 1.2, and of 2×8² images of 48 1.6.
MOST_POINTWISE_CHANNELS, LEAST_POINTWISE_BRANCHES, LEAST_POINTWISE_PIXELS = 48, 4, 4096


def is_fastest(problem: Problem) -> bool:
    """Whether no other way to compute the problem is as fast, wherever this one computes it.

    Depthwise, see there. Of a dense 1×1 kernel x's second moments are one small matrix product, and so are the
    output and each gradient, whatever the number of branches: little against their maps, where channels are few.
    """
    if depthwise.takes(problem):
        return depthwise.is_fastest(problem)
    return (
        LOADED
        and problem.device == "cpu"
        and problem.geometry.kernel == (1, 1)
        and problem.geometry.groups == 1
        and problem.shape[1] <= MOST_POINTWISE_CHANNELS
        and problem.shape[0] * math.prod(problem.output_size) >= LEAST_POINTWISE_PIXELS
        and sum(mixed.inner(problem).convolved) >= LEAST_POINTWISE_BRANCHES
    )


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for backward: x, and one number a weight."""
    if not problem.grad:
        return 0
    if depthwise.nests(problem):
        return depthwise.saved_bytes(problem)
    nested, problem = mixed.saved_bytes(problem), mixed.inner(problem)
    if depthwise.takes(problem):
        return nested + depthwise.saved_bytes(problem)
    matrix = problem.out_channels * problem.shape[1] // problem.geometry.groups
    weights = matrix * (math.prod(problem.geometry.kernel) if problem.norm == SUM else _kept_taps(problem))
    return nested + problem.input_bytes + weights * torch.promote_types(problem.dtype, torch.float32).itemsize


def _kept_taps(problem: Problem) -> int:
    # One a tap; the identity is a kernel of one.
    taps = zip(problem.branches, problem.convolved, strict=True)
    return sum(t.rows * t.columns if convolved else 1 for t, convolved in taps)


def transient_bytes(problem: Problem) -> int:
    """Bytes that a step holds at most besides what it keeps, its output and its gradients among them.

    Its matrices are as large as the maps, and where there are many channels or taps they are far larger.
    """
    nested = mixed.transient_bytes(problem)
    n, c, h, w = problem.shape
    if depthwise.nests(problem):
        return depthwise.transient_bytes(problem)
    if depthwise.takes(problem):
        return nested + depthwise.transient_bytes(mixed.inner(problem))
    k, groups, cpu = problem.geometry.kernel[0], problem.geometry.groups, problem.device == "cpu"
    cg, small = c // groups, torch.promote_types(problem.dtype, torch.float32)
    compute = convolution_dtype(problem.dtype, problem.device)
    x, y = problem.map_bytes(problem.dtype)
    part = max(x, y)  # of a batch, the images whose maps are converted or centred at a time
    if cpu:
        whole = max(problem.map_bytes(compute))
        part = min(whole, max(CHUNK_BYTES * compute.itemsize // small.itemsize, whole // max(n, 1)))
    converts = not cpu or compute != problem.dtype
    copies = 2 * part if converts else 0
    turned = cpu and not problem.channels_last  # maps are read in channels_last
    kernels = 8 * problem.out_channels * cg * k * k  # float64, as the Gram matrix is
    gram = 8 * groups * (k * k * cg) ** 2
    parts_of_gram = gram + gram // k + gram // k**2 if cpu else 3 * gram
    statistics = (
        parts_of_gram + 3 * 8 * c * k**4 + 4 * kernels
    )  # and the sums with the pivot, a channel and taps' pair
    forward = max(statistics, y + 8 * kernels + copies) + (x if turned else 0)
    if not problem.grad:
        return nested + forward
    if cpu and cg >= LEAST_CHANNELS_BY_BRANCH:
        parts = 2 * part
    else:
        composite = 3 * groups * (k * k * cg) ** 2 * small.itemsize
        lines = 2 * n * (max(h, w) + k // 2) * algebra.SIDES * (k // 2) * c * small.itemsize
        parts = composite + lines + 2 * part
    return nested + max(forward, x + 10 * kernels + parts + copies + (x + y if turned else 0))


def forward(x: Tensor, step: Step, epilogue: Epilogue = NOTHING) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros), and what follows it."""
    is_depthwise = computes_depthwise(x, step)
    if is_depthwise and depthwise.is_nested(step, x.device.type):
        return whole.forward(x, step, is_depthwise, epilogue)

    def inner(x: Tensor, step: Step, epilogue: Epilogue) -> Tensor:
        return whole.forward(x, step, is_depthwise, epilogue)

    return mixed.forward(inner, x, step, epilogue)


def computes_depthwise(x: Tensor, step: Step) -> bool:
    """Whether the step is one of the depthwise operators'."""
    return depthwise.computes(step.geometry, x.shape[1], step.kernel.shape[0], x.device.type, x.dtype)
