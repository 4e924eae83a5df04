"""The coefficients of batch-norm sums and of their gradients, as operators: the rest are expressions of one pixel.

    bn_sum_affine(ys, gammas, betas, eps) -> (means, variances, rstds, centres, scales, shift)
        out = Σ_b scales_b·(y_b − centres_b) + shift. The first three as bn_sum_forward returns them.
    bn_sum_slopes(grad, ys, means, rstds, gammas) -> (dgammas, dbeta, scales, factors, offsets)
        dy_b = scales_b·grad + factors_b·(y_b − centres_b) + offsets_b. The first two as bn_sum_backward does.

Arguments are those of bn_sum.py. `centres`, `scales`, `factors` and `offsets` are B×K and `shift` (K,), float64 for
float64 maps, float32 otherwise; what rounding a mean to them leaves is in the shift and the offsets. Were they
expressions too, a compiler would compute them, in float64, anew at every pixel (steps/open_sum.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import check
from ._extension import LOADED
from .bn_sum import (
    accumulation_dtype,
    bn_sum_backward,
    check_backward,
    check_forward,
    empty_statistics,
    fake_parameters,
    plain_statistics,
    statistics_on_cuda,
)

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")

if not LOADED:
    _LIBRARY.define(
        "bn_sum_affine(Tensor[] ys, Tensor[] gammas, Tensor[] betas, float[] eps)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(
        "bn_sum_slopes(Tensor grad, Tensor[] ys, Tensor means, Tensor rstds, Tensor[] gammas)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

bn_sum_affine = torch.ops.acnet_kernels.bn_sum_affine.default
bn_sum_slopes = torch.ops.acnet_kernels.bn_sum_slopes.default


def _check_affine(ys: list[Tensor], gammas: list[Tensor], betas: list[Tensor], eps: list[float]) -> None:
    check_forward(ys, gammas, betas, eps, None)


def _check_slopes(grad: Tensor, ys: list[Tensor], means: Tensor, rstds: Tensor, gammas: list[Tensor]) -> None:
    check_backward(grad, ys, means, rstds, gammas, [True] * len(ys))


@check.checked(_check_affine)
def _affine(ys: list[Tensor], gammas: list[Tensor], betas: list[Tensor], eps: list[float]) -> tuple[Tensor, ...]:
    means, variances, rstds = (statistics_on_cuda if ys[0].is_cuda else plain_statistics)(ys, eps)
    wide = accumulation_dtype(ys[0].dtype)
    scales = (rstds * torch.stack(gammas) if gammas else rstds.clone()).to(wide)
    centres = means.clone().to(wide)
    shift = (scales * (centres - means)).sum(0)
    for beta in betas:
        shift += beta
    return means, variances, rstds, centres, scales, shift.to(wide)


@check.checked(_check_slopes)
def _slopes(
    grad: Tensor, ys: list[Tensor], means: Tensor, rstds: Tensor, gammas: list[Tensor]
) -> tuple[Tensor, ...]:
    _, dgammas, dbeta = bn_sum_backward(grad, ys, means, rstds, gammas, [False] * len(ys))
    wide, count = accumulation_dtype(ys[0].dtype), grad.numel() // grad.shape[1]
    scales = rstds * torch.stack(gammas) if gammas else rstds.clone()
    factors = (scales * rstds * dgammas / -count).to(wide)
    offsets = scales * dbeta / -count - factors * (means - means.to(wide))
    return dgammas, dbeta, scales.to(wide), factors, offsets.to(wide)


for _device in ("CUDA",) if LOADED else ("CPU", "CUDA"):
    _LIBRARY.impl("bn_sum_affine", _affine, _device)
    _LIBRARY.impl("bn_sum_slopes", _slopes, _device)


def _coefficients(y: Tensor, count: int) -> Tensor:
    return y.new_empty((count, y.shape[1]), dtype=accumulation_dtype(y.dtype))


@torch.library.register_fake("acnet_kernels::bn_sum_affine")
@check.checked(_check_affine)
def _(ys: list[Tensor], gammas: Any, betas: Any, eps: Any) -> tuple[Tensor, ...]:
    y, n = ys[0], len(ys)
    return *empty_statistics(ys), _coefficients(y, n), _coefficients(y, n), _coefficients(y, 1)[0]


@torch.library.register_fake("acnet_kernels::bn_sum_slopes")
@check.checked(_check_slopes)
def _(grad: Tensor, ys: list[Tensor], means: Tensor, rstds: Any, gammas: Any) -> tuple[Tensor, ...]:
    return *fake_parameters(grad, means), *(_coefficients(ys[0], len(ys)) for _ in range(3))


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("coefficients have no derivative; bn_sum_forward has one")


torch.library.register_autograd("acnet_kernels::bn_sum_affine", _refuse)
torch.library.register_autograd("acnet_kernels::bn_sum_slopes", _refuse)
