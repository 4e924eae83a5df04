"""The definition, branch by branch, in plain PyTorch: runs everywhere, and everything is compared with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..spec import Problem, Step
from .batchnorm import batch_norm

NAME = "eager"


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, or None."""
    return None


def declines(problem: Problem) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    return None


def saved_bytes(problem: Problem) -> int:
    """Bytes of maps kept for backward: x, and what each batch norm normalises."""
    if not problem.grad:
        return 0
    return problem.input_bytes + len(problem.batch_stats) * problem.output_bytes


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros)."""
    geometry, out = step.geometry, None
    for name, branch in step.branches.items():
        place = geometry.placement(name)
        y = F.conv2d(
            place.apply(x),
            branch.weight,
            branch.bias,
            geometry.stride,
            place.padding,
            geometry.dilation,
            geometry.groups,
        )
        if branch.norm is not None:
            y = batch_norm(y, branch.norm)
        out = y if out is None else out + y
    assert out is not None
    return out if step.norm is None else batch_norm(out, step.norm)
