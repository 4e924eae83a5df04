"""Batch-norm sums for a compiler: operators for the reductions, tensor expressions for the rest.

out = Σ_b BN_b(y_b) and every dy_b are sums over maps at one pixel, so a compiler that sees them computes what
follows (an activation, a residual, a cast) or precedes (the activation's derivative) in the same pass. Statistics,
channel sums and the coefficients made of them stay the operators of ops/bn_sum_coefficients.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.bn_sum import accumulation_dtype, like
from ..ops.bn_sum_coefficients import bn_sum_affine, bn_sum_slopes


def open_sum(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, means, variances) as bn_sum_forward gives them; differentiable once."""
    return _Sum.apply(len(ys), len(gammas), tuple(eps), dtype, *ys, *gammas, *betas)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, maps: int, affine: int, eps: tuple[float, ...], dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ys, gammas = list(tensors[:maps]), tensors[maps : maps + affine]
        betas = tensors[maps + affine :]
        found = bn_sum_affine(ys, list(gammas), list(betas), list(eps))
        means, variances, rstds, centres, scales, shift = found
        wide = accumulation_dtype(ys[0].dtype)
        out = _per_channel(shift)
        for y, centre, scale in zip(ys, centres, scales, strict=True):
            out = out + (y.to(wide) - _per_channel(centre)) * _per_channel(scale)
        ctx.maps, ctx.affine, ctx.betas = maps, affine, len(betas)
        ctx.save_for_backward(*ys, *gammas, means, rstds, centres)
        ctx.mark_non_differentiable(means, variances)
        return out.to(dtype), means, variances

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        *tensors, means, rstds, centres = ctx.saved_tensors
        ys, gammas = tensors[: ctx.maps], tensors[ctx.maps :]
        grad = like(grad, ys[0])
        dgammas, dbeta, *coefficients = bn_sum_slopes(grad, ys, means, rstds, gammas)
        wide = accumulation_dtype(ys[0].dtype)
        dys: list[Tensor | None] = []
        for y, need, centre, *own in zip(ys, needs[4:], centres, *coefficients, strict=False):
            scale, factor, offset = (_per_channel(values) for values in own)
            dy = scale * grad.to(wide) + factor * (y.to(wide) - _per_channel(centre)) + offset
            dys.append(dy.to(y.dtype) if need else None)
        of_gammas = [d.to(gamma.dtype) for d, gamma in zip(dgammas, gammas, strict=False)]
        return None, None, None, None, *dys, *of_gammas, *(dbeta,) * ctx.betas


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
