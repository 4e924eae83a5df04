"""The definition, branch by branch, in plain PyTorch: runs everywhere, and everything is compared with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from ..spec import SUM, Branch, Problem, Step
from ..steps.batchnorm import batch_norm

NAME = "eager"


def declines(problem: Problem) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    return None


def seen_bytes(problem: Problem) -> int:
    """Bytes of what the branches see of x: x itself, and a copy where it is padded for one on one side alone."""
    n, c, height, width = problem.shape
    pixels = {0: 0}  # branch → of what it sees, 0: x
    for i, taps in enumerate(problem.branches, 1):
        left, right, top, bottom = (max(edge, 0) for edge in problem.geometry.placement(taps).edges)
        copied = max(left, right, top, bottom) > 0
        pixels[i if copied else 0] = (height + top + bottom) * (width + left + right)
    return n * c * sum(pixels.values()) * problem.dtype.itemsize


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for backward: x, what each batch norm normalises, and kernels that autocast casts."""
    if not problem.grad:
        return 0
    return seen_bytes(problem) + problem.normalised_maps * problem.output_bytes + problem.cast_weight_bytes


def transient_bytes(problem: Problem) -> int:
    """Bytes of maps that a step holds at most besides what it keeps, its output and its gradients among them."""
    x, y = problem.map_bytes(problem.dtype)
    # A branch's normalised map, the sum it is added to, and the new sum; or a branch's map beside a new sum.
    forward = y if len(problem.branches) == 1 else 2 * y if problem.norm == SUM else 3 * y
    if not problem.grad:
        return forward
    copied = 0 if problem.channels_last else y  # by the library, which reorders
    return max(forward, x + y + copied + 2 * problem.weights * problem.dtype.itemsize)


def branch_map(x: Tensor, branch: Branch, geometry: Geometry) -> Tensor:
    """What the branch makes of x, before its batch norm."""
    assert branch.taps is not None
    place = geometry.placement(branch.taps)
    if branch.weight is None:
        return place.apply(x)
    args = (geometry.stride, place.padding, place.dilation, geometry.groups)
    return F.conv2d(place.apply(x), branch.weight, branch.bias, *args)


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros)."""
    out = None
    for branch in step.branches:
        y = branch_map(x, branch, step.geometry)
        if branch.norm is not None:
            y = batch_norm(y, branch.norm)
        out = y if out is None else out + y
    assert out is not None
    return out if step.norm is None else batch_norm(out, step.norm)
