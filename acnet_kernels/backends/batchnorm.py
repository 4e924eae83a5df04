"""Batch norm on a `spec.Norm`, with nn.BatchNorm2d's semantics."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..spec import Norm


def batch_norm(y: Tensor, norm: Norm) -> Tensor:
    """nn.BatchNorm2d's forward on y (N×K×H×W): running statistics and the batch counter are updated in place."""
    if not norm.batch_stats:
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.gamma, norm.beta, False, 0.0, norm.eps)
    if norm.running_mean is None or norm.running_var is None:
        return F.batch_norm(y, None, None, norm.gamma, norm.beta, True, 0.0, norm.eps)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        args = (norm.running_mean, norm.running_var, norm.gamma, norm.beta, True, norm.momentum, norm.eps)
        return F.batch_norm(y, *args)
    # momentum=None is the cumulative average: its factor 1/n stays a tensor, so nothing waits for it.
    assert norm.num_batches_tracked is not None
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    out = F.batch_norm(y, mean, var, norm.gamma, norm.beta, True, 1.0, norm.eps)
    factor = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean, factor)
    norm.running_var.lerp_(var, factor)
    return out
