"""Depthwise blocks whose batch norms span processes: `moments_depthwise`, and one collective each way.

Each process finds its own maps' (count, mean, M2) per batch norm and channel from its input's moments; one
all_gather carries all, and Chan's rule merges them. Backward sends this process's share of every dγ_b and of Σg
in one all_reduce. No map but x is kept.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..geometry import slices_of
from ..ops._extension import LOADED
from ..ops.bn_sum import rstds_of
from ..spec import MIXED, Problem, Step, prefers_channels_last
from ..steps import depthwise as ops
from ..steps.packed import pack, pack_taps, unpack_taps
from . import branches, moments_depthwise, synced
from .nodes import Update

NAME = synced.NAME
saved_bytes = moments_depthwise.saved_bytes
transient_bytes = moments_depthwise.transient_bytes


def computes(problem: Problem) -> bool:
    """Whether the problem is depthwise branches, each with a batch norm or one after them, for fast passes."""
    return (
        (LOADED if problem.device == "cpu" else problem.device == "cuda")
        and problem.norm != MIXED
        and all(problem.batch_stats)
        and moments_depthwise.takes(problem)
    )


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros); as synced.forward()."""
    if any(norm.group is None for norm in step.norms):  # normalised by this process's batch
        return synced.forward(x, step)
    inputs = branches.inputs_of(x, step)
    x = x.to(inputs.dtype)
    constants = (
        inputs.eps,
        pack_taps(inputs.branches, inputs.normed),
        pack(step.geometry),
        prefers_channels_last(x, inputs.weights[0]),
    )
    values = x.shape[0] * math.prod(step.geometry.output_size(x.shape[2], x.shape[3]))
    update = functools.partial(_update, inputs)
    counts = values, len(inputs.weights), len(inputs.gammas)
    tensors = x, *inputs.weights, *inputs.gammas, *inputs.betas
    group = inputs.norms[0].group
    if not torch.compiler.is_compiling():  # which keeps statistics out of a node of autograd's graph
        return _Synced.apply(group, counts, constants, update, *tensors)[0]
    out, means, variances = _Synced.apply(group, counts, constants, None, *tensors)
    update(means, variances)
    return out


def _update(inputs: branches.Inputs, means: Tensor, variances: Tensor) -> None:
    shifted = [mean if bias is None else mean + bias for mean, bias in zip(means, inputs.biases, strict=True)]
    synced.move_running(inputs.norms, torch.stack(shifted), variances)


class _Synced(torch.autograd.Function):
    """(group, (values, weights, γs), constants, update, x, *weights, *γ_b, *β_b) → (out, means, variances)."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, counts: tuple[int, int, int], constants: Any, update: Update | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (values, count, affine), (eps, taps, geometry, channels_last) = counts, constants
        x, weights = tensors[0], list(tensors[1 : 1 + count])
        gammas, betas = list(tensors[1 + count : 1 + count + affine]), list(tensors[1 + count + affine :])
        own, variances, pivot, sums, centred = ops.depthwise_statistics(x, weights, eps, taps, geometry)
        packed = torch.cat([own.new_full((1,), values), own.flatten(), (variances * values).flatten()])
        total, means, m2 = synced.gather(packed, len(eps), group)
        rstds = rstds_of(m2 / total.clamp_min(1), eps)
        out = ops.depthwise_apply(x, weights, gammas, betas, means, rstds, pivot, taps, geometry, channels_last)
        # Σ (y_b − mean)·x[t] about the mean of all: the level that the own one differs by, times Σ x[t].
        centred = centred + _level(own - means, sums, taps, geometry).to(centred.dtype)
        unbiased = m2 / (total - 1).clamp_min(1)
        if update is not None:
            update(means, unbiased)
        ctx.group, ctx.counts, ctx.numbers = group, counts, (taps, geometry)
        ctx.beta_dtypes = [beta.dtype for beta in betas]
        ctx.save_for_backward(total, means, rstds, pivot, sums, centred, x, *weights, *gammas)
        ctx.mark_non_differentiable(means, unbiased)
        return out, means, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Any, ...]:
        synced.check_gradient(g)
        total, *kept, sums, centred, x = ctx.saved_tensors[:7]
        _, count, _ = ctx.counts
        rest = ctx.saved_tensors[7:]
        weights, gammas = list(rest[:count]), list(rest[count:])
        needs, statistics = ctx.needs_input_grad[4:], (*kept, sums, centred)
        shares = ops.depthwise_step_backward(
            g, x, weights, gammas, [], *statistics, None, *ctx.numbers, False, [False] * count, True
        )
        _, _, dgammas, dbeta, _ = shares
        averages = torch.cat([dgammas, dbeta[None]]).to(torch.float64, copy=True)
        dist.all_reduce(averages, group=ctx.group)
        averages /= total.clamp_min(1)
        need_weights = list(needs[1 : 1 + count])
        dx, dws, *_ = ops.depthwise_step_backward(
            g, x, weights, gammas, [], *statistics, averages, *ctx.numbers, needs[0], need_weights, False
        )
        given = iter(dws)
        return (
            *(None,) * 4,
            dx if needs[0] else None,
            *(next(given) if need else None for need in need_weights),
            *(d.to(gamma.dtype) for d, gamma in zip(dgammas, gammas, strict=False)),
            *(dbeta.to(dtype) for dtype in ctx.beta_dtypes),
        )


def _level(difference: Tensor, sums: Tensor, taps: list[int], geometry: list[int]) -> Tensor:
    """Of every number of the batch norms' kernels, difference_b·Σ_p x[p, t], K×numbers."""
    multiplier = difference.shape[1] // sums.shape[0]
    wide = sums.repeat_interleave(multiplier, 0)  # K×taps
    found = unpack_taps(taps)
    if len(difference) < len(found):  # one of the sum
        return difference[0][:, None] * wide
    of_taps = wide.view(-1, geometry[0], geometry[1])
    parts = []
    for d, (own, _) in zip(difference, found, strict=True):
        rows, columns = slices_of(own)
        parts.append(d[:, None] * of_taps[:, rows, columns].flatten(1))
    return torch.cat(parts, 1)
