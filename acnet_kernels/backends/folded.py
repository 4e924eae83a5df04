"""One convolution with weights folded on the fly: the block whenever running statistics normalise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.fusion import fold_as_it_is
from ..spec import Problem, Step, prefers_channels_last

NAME = "folded"


def declines(problem: Problem) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    return "a batch norm normalises by the batch" if any(problem.batch_stats) else None


def saved_bytes(problem: Problem) -> int:
    """Bytes of maps kept for backward: x alone."""
    return problem.input_bytes if problem.grad else 0


def transient_bytes(problem: Problem) -> int:
    """Bytes of maps that a step holds at most besides what it keeps, its output and its gradients among them."""
    x, y = problem.map_bytes(problem.dtype)
    return max(y, x) if problem.grad else y


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros); differentiable."""
    geometry = step.geometry
    weight, bias = fold_as_it_is(step)
    if weight.shape[1] == 1 and prefers_channels_last(x, step.kernel):
        weight = weight.to(memory_format=torch.channels_last)  # dense in both layouts, and folded in the other
    place = geometry.placement(geometry.whole)
    return F.conv2d(x, weight, bias, geometry.stride, place.padding, place.dilation, geometry.groups)
