"""Batch norm on a `spec.Norm`, with nn.BatchNorm2d's semantics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    if norm.momentum is not None:  # F.batch_norm less its check of the size, which the step has passed
        running, cudnn = (norm.running_mean, norm.running_var), torch.backends.cudnn.enabled
        return torch.batch_norm(y, norm.gamma, norm.beta, *running, True, norm.momentum, norm.eps, cudnn)
    # momentum=None is the cumulative average: its factor 1/n stays a tensor, so nothing waits for it.
    assert norm.num_batches_tracked is not None
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    out = F.batch_norm(y, mean, var, norm.gamma, norm.beta, True, 1.0, norm.eps)
    factor = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean, factor)
    norm.running_var.lerp_(var, factor)
    return out


def update_running(
    norms: Sequence[Norm], means: Tensor, variances: Tensor, count: int, biases: Sequence[Tensor | None]
) -> None:
    """Moves the running statistics and batch counters of all norms as nn.BatchNorm2d does, in place.

    An empty batch (count 0) moves the counters alone.

    Args:
        norms: the batch norms, all normalising by the batch.
        means, variances: (norms, K) float64, of maps without their convolution's bias, the variances biased ones.
        count: elements per channel, none or more than 1; the running variance is the unbiased one.
        biases: the convolution's bias (K) of each norm, or None; it moves the mean only.
    """
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    tracked = [b for b, norm in enumerate(norms) if norm.running_mean is not None]
    if not tracked or count == 0:
        return
    variances = variances * (count / (count - 1))
    running: list[Tensor] = []
    values: list[Tensor] = []
    factors: list[float | Tensor] = []
    for b in tracked:
        norm, mean, variance, bias = norms[b], means[b], variances[b], biases[b]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        dtype = norm.running_mean.dtype
        factor: float | Tensor
        if norm.momentum is not None:
            factor = norm.momentum
        else:  # the cumulative average; 1/n stays a tensor, so nothing waits for it
            assert norm.num_batches_tracked is not None
            factor = norm.num_batches_tracked.to(dtype).reciprocal()
        running += [norm.running_mean, norm.running_var]
        values += [(mean if bias is None else mean + bias).to(dtype), variance.to(dtype)]
        factors += [factor, factor]
    if isinstance(factors[0], float) and all(factor is factors[0] or factor == factors[0] for factor in factors):
        torch._foreach_lerp_(running, values, factors[0])
    else:
        for target, value, factor in zip(running, values, factors, strict=True):
            target.lerp_(value, factor)
