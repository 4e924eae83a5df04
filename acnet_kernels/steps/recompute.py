"""A step that keeps nothing but x, as operators: schema, fake, kernels, autograd.

    recompute_step(x, weights, gammas, betas, eps, taps, geometry, dtype, channels_last)
        -> (out, means, variances, rstds)
        out = Σ_b BN_b(W_b * x) by the batch's statistics, in `dtype`, None for that of x, and the layout named.
    recompute_step_backward(grad, x, weights, gammas, means, rstds, eps, taps, geometry, need_x, need_weights,
                            need_gammas) -> (dx, dws, dgammas, dbeta)
        Gradients of what is needed; dws holds those of the weights that need one, the others are empty.

Arguments: `weights` holds one entry a convolution, `eps` and, unless [], `gammas` and `betas` one a batch norm: one
a branch, or one after their sum; `taps` and `geometry` are what `pack_taps` and `pack` make of them. `means`,
`variances` (biased) and `rstds`: B×K, float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import bn_sum, check
from ..ops._extension import TRITON
from ..ops.bn_sum import accumulation_dtype
from .convolution import merge_kernels
from .maps import StepConfig, config_of, convolution_gradients
from .packed import check_affine, check_problem, unpack, unpack_normed, unpack_taps
from .recorded import record

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
_LIBRARY.define(
    "recompute_step(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] taps,"
    " int[] geometry, ScalarType? dtype, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "recompute_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor means, Tensor rstds,"
    " float[] eps, int[] taps, int[] geometry, bool need_x, bool[] need_weights, bool need_gammas)"
    " -> (Tensor, Tensor[], Tensor, Tensor)"
)

recompute_step = torch.ops.acnet_kernels.recompute_step.default
recompute_step_backward = torch.ops.acnet_kernels.recompute_step_backward.default


def check_step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype | None,
    channels_last: bool,
) -> None:
    """ValueError where an argument of recompute_step does not fit the others; the message names it."""
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas)
    _check_images(x)
    check_problem(x, weights, gammas, len(eps), taps, geometry)
    check_affine(weights, len(eps), betas=betas)
    if dtype is not None and dtype not in check.FLOATS:
        raise ValueError(f"dtype must be None, float32, float64, float16 or bfloat16, got {dtype}")


def _check_images(x: Tensor) -> None:
    if x.dim() == 4 and x.shape[0] < 1:
        raise ValueError(f"x must hold an image, got shape {tuple(x.shape)}")


def check_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> None:
    """ValueError where an argument of recompute_step_backward does not fit the others; the message names it."""
    check.one_device(x=x, grad=grad, weights=weights, gammas=gammas, means=means, rstds=rstds)
    _check_images(x)
    shape = check_problem(x, weights, gammas, len(eps), taps, geometry)
    check.shape(shape, grad=grad)
    check.floats(grad=grad)
    check.length(len(weights), "one a weight", need_weights=need_weights)
    check.shape((len(eps), shape[1]), means=means, rstds=rstds)
    check.dtype(torch.float64, "as recompute_step returns it", means=means, rstds=rstds)
    check.contiguous(means=means, rstds=rstds)


@torch.library.register_fake("acnet_kernels::recompute_step")
@check.checked(check_step)
def _(
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    betas: Any,
    eps: Any,
    taps: Any,
    geometry: list[int],
    dtype: torch.dtype | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K = weights[0].shape[0]
    size = unpack(geometry).output_size(x.shape[2], x.shape[3])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((x.shape[0], K, *size), dtype=dtype or x.dtype, device=x.device, memory_format=layout)
    means, variances, rstds = (x.new_empty((len(eps), K), dtype=torch.float64) for _ in range(3))
    return out, means, variances, rstds


@torch.library.register_fake("acnet_kernels::recompute_step_backward")
@check.checked(check_backward)
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    means: Tensor,
    rstds: Any,
    eps: Any,
    taps: Any,
    geometry: Any,
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    dtype = accumulation_dtype(grad.dtype)
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        [torch.empty_like(w) for w, need in zip(weights, need_weights, strict=True) if need],
        torch.empty_like(means, dtype=dtype) if need_gammas else means.new_empty(0, dtype=dtype),
        means.new_empty(means.shape[1], dtype=dtype),
    )


# ---- the kernels ----


def step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """recompute_step."""
    dtype = x.dtype if dtype is None else dtype
    branches, normed = unpack_taps(taps), unpack_normed(taps)
    config = config_of(unpack(geometry), branches, eps, normed, len(gammas), dtype, x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        if _has_triton(x) and config.is_triton():
            out, means, variances, rstds = _without_maps(x, weights, gammas, betas, config)
        else:
            out, _, means, variances, rstds = config.forward(x, tuple(weights), gammas, betas)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return out.to(dtype).contiguous(memory_format=layout), means, variances, rstds


def _has_triton(x: Tensor) -> bool:
    """Whether the Triton pass computes these statistics: on CUDA, but for float64."""
    return x.is_cuda and x.dtype != torch.float64 and TRITON


def _without_maps(
    x: Tensor, weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor], config: StepConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, means, variances, rstds); no y_b is ever in memory. out is of the convolutions' dtype or wider."""
    x, geometry = x.to(config.conv_dtype), config.geometry
    kernels = [weight.to(config.conv_dtype) for weight in weights]
    means, variances, rstds = _triton_statistics(x, kernels, config)
    scale = rstds * torch.stack(gammas) if gammas else rstds
    top = scale.abs().amax(0)
    top = top.masked_fill(~(top > 0), 1)
    wide = bn_sum.accumulation_dtype(x.dtype)
    folded = _folded(kernels, scale / top, config).to(x.dtype)
    place = geometry.placement(geometry.whole)
    z = F.conv2d(x, folded, None, geometry.stride, place.padding, place.dilation, geometry.groups)
    # The mean that this convolution's own rounding gives: as in a batch norm, a level much larger than the spread
    # cancels exactly.
    mean = bn_sum.statistics_on_cuda([z], [1.0])[0][0]
    centre = mean.to(wide)
    shift = top * (centre - mean)
    for beta in betas:
        shift += beta
    centre, top, shift = (t.to(wide)[:, None, None] for t in (centre, top, shift))
    return z.to(wide).sub_(centre).mul_(top).add_(shift), means, variances, rstds


def _triton_statistics(x: Tensor, kernels: list[Tensor], config: StepConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(means, variances, rstds) of every y_b, B×K float64, in two launches."""
    from ..ops import triton_conv  # Triton is slow to import, and only CUDA needs it
    from ..ops.triton_bn_sum import merge_statistics

    taps = [taps for taps, _ in config.branches]
    if config.is_summed():
        kernels, taps = [config.merged(kernels)], [config.geometry.whole]
    x = x.contiguous(memory_format=torch.channels_last)
    weights = [weight.contiguous(memory_format=torch.channels_last) for weight in kernels]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _, moments = triton_conv.conv_forward(x, weights, triton_conv.Window.of(config.geometry, taps), store=False)
        norms = merge_statistics(moments, [], [], config.eps)
    return norms.means, norms.variances, norms.rstds


def _folded(kernels: list[Tensor], scale: Tensor, config: StepConfig) -> Tensor:
    """Σ_b scale_b·W_b, at least float32; scale is B×K, or 1×K of all."""
    wide = bn_sum.accumulation_dtype(kernels[0].dtype)
    rows = scale.to(wide).expand(len(kernels), -1)
    scaled = [weight.to(wide) * row[:, None, None, None] for weight, row in zip(kernels, rows, strict=True)]
    return merge_kernels(scaled, [taps for taps, _ in config.branches], config.geometry)


def step_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """recompute_step_backward."""
    dtype = bn_sum.accumulation_dtype(grad.dtype)
    none = means.new_empty(0, dtype=dtype)
    if not (need_x or any(need_weights) or need_gammas):
        return x.new_empty(0), [], none, grad.sum((0, 2, 3), dtype=dtype)
    branches, normed = unpack_taps(taps), unpack_normed(taps)
    config = config_of(unpack(geometry), branches, eps, normed, len(gammas), grad.dtype, x.device.type)
    needs_dy = config.needs_dy(need_x, need_weights)
    with torch.autocast(x.device.type, enabled=False):
        ys = config.maps(x, tuple(weights))
        if (
            _has_triton(x) and config.is_triton()
        ):  # forward's are of another kernel's maps: what that rounds otherwise, times Σg, is no dγ
            means, _, rstds = bn_sum.statistics_on_cuda(ys, eps)
        like = bn_sum.like(grad, ys[0])
        kept = ys if config.is_summed() else [y for y, (_, own) in zip(ys, config.branches, strict=True) if own]
        dys, dgammas, dbeta = config.map_gradients(like, x, kept, means, rstds, gammas, needs_dy, True)
        dx, dws = convolution_gradients(config, dys, x, tuple(weights), need_x, tuple(need_weights))
    return (
        x.new_empty(0) if dx is None else _as(dx, x),
        [_as(dw, weight) for dw, weight in zip(dws, weights, strict=True) if dw is not None],
        dgammas if need_gammas else none,
        dbeta,
    )


def _as(gradient: Tensor, like: Tensor) -> Tensor:
    """gradient in like's dtype and, as the operator promises, in the layout of torch.empty_like(like)."""
    target = torch.empty_like(like, device="meta")
    if (gradient.dtype, gradient.stride()) == (target.dtype, target.stride()):
        return gradient
    return torch.empty_like(like).copy_(gradient)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("recompute_step", check.checked(check_step)(step), _device)
    _LIBRARY.impl("recompute_step_backward", check.checked(check_backward)(step_backward), _device)

RECORDED = record(
    "recompute_step",
    lambda grad, x, weights, gammas, kept, constants: (grad, x, weights, gammas, *kept, *constants[:3]),
)
