"""Batch norm on a `spec.Norm`, with nn.BatchNorm2d's semantics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_compat import below_autograd, foreach_add_, foreach_mul_
from ..ops import running
from ..ops._extension import LOADED
from ..ops.running import Running
from ..spec import Norm


def batch_norm(y: Tensor, norm: Norm) -> Tensor:
    """nn.BatchNorm2d's forward on y (N×K×H×W): running statistics and the batch counter are updated in place."""
    if not norm.batch_stats:
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.gamma, norm.beta, False, 0.0, norm.eps)
    # F.batch_norm less its checks, of the size, which the step has passed, and, in newer releases, of an ε of 0.
    affine, cudnn = (norm.gamma, norm.beta), torch.backends.cudnn.enabled
    if norm.running_mean is None or norm.running_var is None:
        return torch.batch_norm(y, *affine, None, None, True, 0.0, norm.eps, cudnn)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        buffers = norm.running_mean, norm.running_var
        return torch.batch_norm(y, *affine, *buffers, True, norm.momentum, norm.eps, cudnn)
    # momentum=None is the cumulative average: its factor 1/n stays a tensor, so nothing waits for it.
    assert norm.num_batches_tracked is not None
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    try:
        return torch.batch_norm(y, *affine, mean, var, True, 1.0, norm.eps, cudnn)
    finally:  # a recomputation may end with what is saved for backward, which comes after the statistics
        factor = norm.num_batches_tracked.to(mean.dtype).reciprocal()
        move(norm.running_mean, mean, factor)
        move(norm.running_var, var, factor)


def move(running: Tensor, value: Tensor, factor: float | Tensor) -> None:
    """running ← (1 − factor)·running + factor·value, in place: as nn.BatchNorm2d does, an infinite one stays so."""
    running.mul_(1 - factor).add_(factor * value)


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
    if len(norms) > 1 and any(norm.momentum is None for norm in norms):  # each has a factor of its own
        for b, norm in enumerate(norms):
            update_running([norm], means[b : b + 1], variances[b : b + 1], count, [biases[b]])
        return
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    tracked = [b for b, norm in enumerate(norms) if norm.running_mean is not None]
    if len(tracked) < len(norms):
        means, variances = (torch.stack([t[b] for b in tracked]) if tracked else t[:0] for t in (means, variances))
    running_means: list[Tensor] = []
    running_vars: list[Tensor] = []
    momenta: list[float | None] = []
    for b in tracked:
        norm = norms[b]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None or norm.num_batches_tracked is not None
        running_means.append(norm.running_mean)
        running_vars.append(norm.running_var)
        momenta.append(norm.momentum)
    shifts = [biases[b] for b in tracked]
    if any(shift is not None for shift in shifts):
        moved = [mean if shift is None else mean + shift for mean, shift in zip(means, shifts, strict=True)]
        means = torch.stack(moved)
    _move_all(running_means, running_vars, counters, means, variances, momenta, count)


def _move_all(
    running_means: list[Tensor],
    running_vars: list[Tensor],
    counters: list[Tensor],
    means: Tensor,
    variances: Tensor,
    momenta: list[float | None],
    count: int,
) -> None:
    """ops/running.py's operator, with None for NaN, or the same in PyTorch."""
    if LOADED and means.is_cpu and not torch.compiler.is_compiling():
        factors = [math.nan if momentum is None else momentum for momentum in momenta]
        with below_autograd():  # nothing here is differentiated
            running.update_running_(running_means, running_vars, counters, means, variances, factors, count)
    else:
        _update_running(running_means, running_vars, counters, means, variances, momenta, count)


class Update(NamedTuple):
    """update_running() to come, of everything but the batch's statistics; `elements` is its count."""

    norms: Sequence[Norm]
    elements: int
    biases: Sequence[Tensor | None]

    def __call__(self, means: Tensor, variances: Tensor) -> None:
        update_running(self.norms, means, variances, self.elements, self.biases)

    def running(self) -> Running | None:
        """The buffers, for an operator that moves them itself, or None where it does not take them."""
        means, variances, counters = [], [], []
        for norm in self.norms:
            mean, var, counter = norm.running_mean, norm.running_var, norm.num_batches_tracked
            if mean is None or var is None or counter is None or counter.numel() != 1:
                return None
            means.append(mean)
            variances.append(var)
            counters.append(counter)
        shifts = [bias for bias in self.biases if bias is not None]
        if shifts and len(shifts) < len(means):
            return None
        running = Running(means, variances, counters, shifts, [norm.momentum for norm in self.norms])
        return running if _is_for_kernels(running) else None


class Tracked(NamedTuple):
    """An Update of given buffers, without shifts or cumulative averages; `elements` is its count."""

    buffers: Running
    elements: int

    def __call__(self, means: Tensor, variances: Tensor) -> None:
        own_means, own_vars, counters, _, momenta = self.buffers
        moved = (list(own_means), list(own_vars), list(counters), means, variances, list(momenta))
        _move_all(*moved, self.elements)

    def running(self) -> Running | None:
        """As Update's."""
        return self.buffers if _is_for_kernels(self.buffers) else None


def _is_for_kernels(running: Running) -> bool:
    """Whether Triton's kernels can move these buffers."""
    means, variances, counters, shifts, _ = running
    if not all(counter.numel() == 1 for counter in counters):
        return False
    if len({t.data_ptr() for t in (*means, *variances, *counters)}) < 3 * len(means):  # one norm twice
        return False
    return all(t.is_contiguous() for t in (*means, *variances, *shifts))


def _update_running(
    running_means: list[Tensor],
    running_vars: list[Tensor],
    counters: list[Tensor],
    means: Tensor,
    variances: Tensor,
    momenta: list[float | None],
    count: int,
) -> None:
    """ops/running.py's operator in PyTorch, with None for NaN; nothing waits for the device."""
    for counter in counters:
        if counter.dtype not in running.COUNTERS or counter.numel() != 1:
            raise TypeError(
                f"num_batches_tracked must be one number of a dtype in {running.COUNTERS}, got {counter.dtype} of "
                f"shape {tuple(counter.shape)}"
            )
    if counters:
        foreach_add_(counters, 1)
    if not momenta or count == 0:
        return
    variances = variances * (count / (count - 1))
    targets = [*running_means, *running_vars]
    values = [v.to(t.dtype) for v, t in zip((*means, *variances), targets, strict=True)]
    if momenta[0] is None:  # 1/n stays a tensor, so nothing waits for it
        factor = counters[0].to(means.dtype).reciprocal()
        for target, value in zip(targets, values, strict=True):
            move(target, value, factor.to(target.dtype))
    elif all(momentum == momenta[0] for momentum in momenta):  # as `move` does, in two calls
        foreach_mul_(targets, 1 - momenta[0])
        foreach_add_(targets, values, alpha=momenta[0])
    else:
        for target, value, momentum in zip(targets, values, momenta * 2, strict=True):
            assert momentum is not None
            move(target, value, momentum)
