"""Batch norms synchronised over processes (nn.SyncBatchNorm): one collective forward and one backward a block.

Each process reduces its own maps to (count, mean, M2) per branch and channel; one all_gather carries all
branches, and Chan's rule merges them whatever the counts. Backward sends Σg, which the branches share, and one
Σ g·(y_b − μ_b) a branch in one all_reduce. nn.SyncBatchNorm needs one of each a branch. Nobody requests this
backend: it runs where norms are synchronised.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.bn_sum import mean_and_variance, rstds_of
from ..spec import Norm, Problem, Step
from ..steps.batchnorm import batch_norm, move
from .eager import branch_map, seen_bytes
from .nodes import Update, wants_definition

NAME = "synced"


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for backward: x, what each batch norm normalises, and kernels that autocast casts."""
    if not problem.grad:
        return 0
    return seen_bytes(problem) + problem.normalised_maps * problem.output_bytes + problem.cast_weight_bytes


def transient_bytes(problem: Problem) -> int:
    """Bytes of maps that a step holds at most besides what it keeps, its output and its gradients among them."""
    x, y = problem.map_bytes(problem.dtype)
    _, wide = problem.map_bytes(torch.promote_types(problem.dtype, torch.float32))
    return max(y + 4 * wide, x + len(problem.batch_stats) * y + 3 * wide)


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros).

    N may differ from process to process, and be 0 on some. γ and β get this process's share of the gradient,
    as nn.SyncBatchNorm's do: DistributedDataParallel adds the shares up.
    """
    maps, norms, out = [], [], None
    for branch in step.branches:
        y = branch_map(x, branch, step.geometry)
        if branch.norm is not None and branch.norm.group is not None:
            maps.append(y)
            norms.append(branch.norm)
            continue
        if branch.norm is not None:  # frozen, or normalised by this process's batch
            y = batch_norm(y, branch.norm)
        out = y if out is None else out + y
    if maps:
        live = _normalised_sum(maps, norms)
        out = live if out is None else out + live
    assert out is not None
    if step.norm is None:
        return out
    return batch_norm(out, step.norm) if step.norm.group is None else _normalised_sum([out], [step.norm])


def _normalised_sum(maps: list[Tensor], norms: list[Norm]) -> Tensor:
    """Σ_b BN_b(y_b) by the statistics of all processes; running statistics and counters are updated."""
    eps = [norm.eps for norm in norms]
    affine = [*(norm.gamma for norm in norms), *(norm.beta for norm in norms)]
    update = functools.partial(move_running, norms)
    if not torch.compiler.is_compiling():  # which keeps statistics out of a node of autograd's graph
        return _SyncedSum.apply(norms[0].group, eps, update, *maps, *affine)[0]
    out, mean, var = _SyncedSum.apply(norms[0].group, eps, None, *maps, *affine)
    update(mean, var)
    return out


def move_running(norms: Sequence[Norm], mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics and counters by the batch's mean and unbiased variance of each norm, B×K."""
    for norm, mean_b, var_b in zip(norms, mean, var, strict=True):
        if norm.running_mean is None or norm.running_var is None:
            continue
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        for running, batch in ((norm.running_mean, mean_b), (norm.running_var, var_b)):
            factor: Any = norm.momentum
            if factor is None:  # the cumulative average
                factor = norm.num_batches_tracked.to(running.dtype).reciprocal()
            move(running, batch.to(running.dtype), factor)


def _per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


def _moments(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, M2 = Σ(y − mean)²) per channel, both (K,) of dtype; zeros for an empty map."""
    if y.numel() == 0:
        return y.new_zeros(y.shape[1], dtype=dtype), y.new_zeros(y.shape[1], dtype=dtype)
    mean, var = mean_and_variance(y.to(dtype))
    return mean, var * (y.numel() // y.shape[1])


def merge(packed: Tensor, branches: int) -> tuple[Tensor, Tensor, Tensor]:
    """(count (), mean B×K, M2 B×K) of all processes from P rows [count, means, M2s], by Chan's rule."""
    count = packed[:, 0]
    mean_p, m2_p = packed[:, 1:].view(len(packed), 2, branches, -1).unbind(1)
    weight = (count / count.sum().clamp_min(1))[:, None, None]
    mean = (weight * mean_p).sum(0)
    m2 = m2_p.sum(0) + (count[:, None, None] * (mean_p - mean).square()).sum(0)
    return count.sum(), mean, m2


def gather(packed: Tensor, branches: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """merge() of what each process of the group has packed."""
    rows = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, packed, group=group)
    return merge(torch.stack(rows), branches)


def check_gradient(g: Tensor) -> None:
    """RuntimeError for a gradient that has no rule."""
    if wants_definition(g):
        raise RuntimeError(
            "SyncBatchNorm's processes exchange the sums of one gradient at a time: neither a batch of them "
            "(is_grads_batched, vectorize) nor a forward-mode one has a rule"
        )


class _SyncedSum(torch.autograd.Function):
    """(group, ε a branch, update, *y_b, *γ_b, *β_b) → (Σ_b BN_b(y_b), batch means B×K, unbiased variances B×K).

    Statistics are accumulated in float32 or better, sent and merged in float64 (counts stay exact). update moves
    the running ones by them before anything is saved for backward, as in nodes.py.
    """

    @staticmethod
    def forward(
        ctx: Any, group: Any, eps: list[float], update: Update | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(eps)
        maps, gammas, betas = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        first = maps[0]
        assert first is not None
        dtype = torch.promote_types(first.dtype, torch.float32)
        local = [_moments(y, dtype) for y in maps if y is not None]
        count = torch.full((1,), first.numel() // first.shape[1], dtype=torch.float64, device=first.device)
        packed = torch.cat([count, *(mean.double() for mean, _ in local), *(m2.double() for _, m2 in local)])
        total, mean, m2 = gather(packed, n, group)
        rstd = rstds_of(m2 / total.clamp_min(1), eps)
        saved_mean, saved_rstd = mean.to(dtype), rstd.to(dtype)
        out = None
        for y, gamma, beta, mean_b, rstd_b in zip(maps, gammas, betas, saved_mean, saved_rstd, strict=True):
            assert y is not None
            scale = rstd_b if gamma is None else rstd_b * gamma.to(dtype)
            part = (y.to(dtype) - _per_channel(mean_b)) * _per_channel(scale)
            part = part if beta is None else part + _per_channel(beta.to(dtype))
            out = part if out is None else out + part
        assert out is not None
        var = m2 / (total - 1).clamp_min(1)
        if update is not None:
            update(mean, var)
        ctx.group, ctx.branches = group, n
        ctx.save_for_backward(total.to(dtype), saved_mean, saved_rstd, *maps, *gammas, *betas)
        ctx.mark_non_differentiable(mean, var)
        return out.to(first.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Any, ...]:
        check_gradient(g)
        total, mean, rstd, *tensors = ctx.saved_tensors
        n, dtype = ctx.branches, mean.dtype
        maps, gammas, betas = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        g = g.to(dtype)
        dims = (0, 2, 3)
        products = [(g * (y.to(dtype) - _per_channel(m))).sum(dims) for y, m in zip(maps, mean, strict=True)]
        local = torch.stack([g.sum(dims), *products])  # (1 + B)×K
        sums = local.to(torch.float64, copy=True)  # local is this process's share of dγ and dβ
        dist.all_reduce(sums, group=ctx.group)
        g_mean, *product_means = (sums / total.clamp_min(1)).to(dtype)
        d_maps, d_gammas, d_betas = [], [], []
        for b, (y, gamma, beta) in enumerate(zip(maps, gammas, betas, strict=True)):
            scale = rstd[b] if gamma is None else rstd[b] * gamma.to(dtype)
            y_factor = product_means[b] * rstd[b].square()
            centred = y.to(dtype) - _per_channel(mean[b])
            dy = _per_channel(scale) * (g - _per_channel(g_mean) - centred * _per_channel(y_factor))
            d_maps.append(dy.to(y.dtype))
            d_gammas.append(None if gamma is None else (local[1 + b] * rstd[b]).to(gamma.dtype))
            d_betas.append(None if beta is None else local[0].to(beta.dtype))
        return None, None, None, *d_maps, *d_gammas, *d_betas
