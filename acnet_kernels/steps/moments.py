"""The operators of dense `moments` steps: schema, fake, kernels, autograd.

    moments_step(x, weights, gammas, betas, eps, taps, geometry, dtype, channels_last)
        -> (out, means, variances, rstds, pivot, sums, centred)
        out = Σ_b BN_b(W_b * x) by the batch's statistics, in x's dtype and the layout named; differentiable in the
        tensors. means, (biased) variances and rstds are B×K in float64. What follows is for the gradient alone.
    moments_step_backward(grad, x, weights, gammas, means, rstds, pivot, sums, centred, taps, geometry, dtype,
                          accumulates, need_x, need_weights, need_gammas) -> (dx, dws, dgammas, dbeta)
        Gradients of what is needed; dws holds those of the weights that need one, the others are empty.
        `accumulates` says whether the library's convolutions may add to what is there.

Arguments: `x`, N×C×H×W of any layout; `weights`, K×C/groups×rows×columns, one entry a convolution; `eps` and,
unless [], `gammas` and `betas` (K), one entry a batch norm: one a branch, or one after their sum; `taps` and
`geometry` are what `pack_taps` and `pack` (packed.py) make of them: an odd square kernel, stride 1, dilation 1, and
the padding that keeps the size; `dtype`, what the library's convolutions compute in: x's, or float32 for half
precision. `pivot` (C, at least float32) is what x was centred by, `sums` (groups×(taps·C/groups), float64) are
those of its patches, tap by tap; `centred` holds rstd_b·W_b·(G − SSᵀ/M) of every batch norm's kernel, K×numbers of
pivot's dtype.

The C++ kernels (csrc/moments_step.cpp) register themselves for the CPU with the schemas below; the others are in
moments_passes.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import check
from ..ops._extension import LOADED
from ..ops.bn_sum import accumulation_dtype
from . import moments_passes
from .convolution import accumulates
from .packed import check_affine, check_problem, numbers_of
from .recorded import record

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
if not LOADED:
    _LIBRARY.define(
        "moments_step(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] taps,"
        " int[] geometry, ScalarType dtype, bool channels_last)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(
        "moments_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor means,"
        " Tensor rstds, Tensor pivot, Tensor sums, Tensor centred, int[] taps, int[] geometry, ScalarType dtype,"
        " bool accumulates, bool need_x, bool[] need_weights, bool need_gammas)"
        " -> (Tensor, Tensor[], Tensor, Tensor)"
    )


def check_step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    """ValueError where an argument of moments_step does not fit the others; the message names it."""
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas)
    _check_problem(x, weights, gammas, len(eps), taps, geometry, dtype)
    check_affine(weights, len(eps), betas=betas)


def _check_problem(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    norms: int,
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """The shape of the output."""
    shape = check_problem(x, weights, gammas, norms, taps, geometry)
    kernel = geometry[0]
    check.kernel_size(kernel)
    wanted = [kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1]
    if list(geometry[:8]) != wanted:
        raise ValueError(f"geometry must be {wanted} but for the groups, got {geometry}")
    if dtype != x.dtype and not (dtype == torch.float32 and x.dtype.itemsize == 2):
        raise ValueError(f"dtype must be that of x, {x.dtype}, or float32 for half precision, got {dtype}")
    return shape


def check_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    sums: Tensor,
    centred: Tensor,
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype,
    accumulates: bool,
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> None:
    """ValueError where an argument of moments_step_backward does not fit the others; the message names it."""
    kept = {"means": means, "rstds": rstds, "pivot": pivot, "sums": sums, "centred": centred}
    check.one_device(x=x, grad=grad, weights=weights, gammas=gammas, **kept)
    if means.dim() != 2:
        raise ValueError(f"means must have shape (norms, K), got {tuple(means.shape)}")
    norms = means.shape[0]
    shape = _check_problem(x, weights, gammas, norms, taps, geometry, dtype)
    cg, groups, wide = weights[0].shape[1], geometry[8], accumulation_dtype(x.dtype)
    check.shape(shape, grad=grad)
    check.dtype(x.dtype, "as x", grad=grad)
    check.length(len(weights), "one a weight", need_weights=need_weights)
    check.shape((norms, shape[1]), means=means, rstds=rstds)
    check.shape((x.shape[1],), pivot=pivot)
    check.shape((groups, geometry[0] ** 2 * cg), sums=sums)
    check.shape((shape[1], numbers_of(norms, taps, geometry) * cg), centred=centred)
    check.dtype(torch.float64, "as moments_step returns it", means=means, rstds=rstds, sums=sums)
    check.dtype(wide, "as moments_step returns it", pivot=pivot, centred=centred)
    check.contiguous(**kept)


@torch.library.register_fake("acnet_kernels::moments_step")
@check.checked(check_step)
def _(
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    betas: Any,
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    dtype: Any,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    (n, c, h, w), wide = x.shape, accumulation_dtype(x.dtype)
    k, cg = weights[0].shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    means, variances, rstds = (x.new_empty(len(eps), k, dtype=torch.float64) for _ in range(3))
    return (
        torch.empty(n, k, h, w, dtype=x.dtype, device=x.device, memory_format=layout),
        means,
        variances,
        rstds,
        x.new_empty(c, dtype=wide),
        x.new_empty(geometry[8], geometry[0] ** 2 * cg, dtype=torch.float64),
        x.new_empty(k, numbers_of(len(eps), taps, geometry) * cg, dtype=wide),
    )


@torch.library.register_fake("acnet_kernels::moments_step_backward")
@check.checked(check_backward)
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    sums: Tensor,
    centred: Tensor,
    taps: Any,
    geometry: Any,
    dtype: Any,
    accumulates: Any,
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        [torch.empty_like(weight) for weight, need in zip(weights, need_weights, strict=True) if need],
        torch.empty_like(means, dtype=wide) if need_gammas else means.new_empty(0, dtype=wide),
        means.new_empty(means.shape[1], dtype=wide),
    )


for _device in ("CUDA",) if LOADED else ("CPU", "CUDA"):
    _LIBRARY.impl("moments_step", check.checked(check_step)(moments_passes.step), _device)
    _LIBRARY.impl("moments_step_backward", check.checked(check_backward)(moments_passes.step_backward), _device)

RECORDED = record(
    "moments_step",
    lambda grad, x, weights, gammas, kept, constants: (
        grad, x, weights, gammas, *kept, *constants[1:4], accumulates()
    ),
)  # fmt: skip
