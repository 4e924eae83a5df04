"""Nothing kept but x, for any geometry: `branches`, whose maps are computed a second time for backward.

On CUDA, but for float64, the forward stores no map either. The statistics are one Triton pass; out is one k×k
convolution with the kernels folded by them, z = Σ_b (s_b/s)·W_b * x, s the largest of the |s_b|, normalised:
s·(z − its mean) + Σ_b β_b. Of one branch alone z is y_b, bit for bit. Exactly three batch norms' training semantics
everywhere.

Three more convolutions a step, on CUDA four: this runs on request, and under the memory saver where `moments` does
not surely need less.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import bn_sum
from ..ops import recompute as ops
from ..ops._extension import TRITON
from ..ops.check import checked
from ..spec import Problem, Step, prefers_channels_last
from . import branches, mixed, node, nodes
from .batchnorm import update_running
from .convolution import convolution_dtype, merge_kernels

NAME = "recompute"


def declines(problem: Problem) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    return branches.declines(problem)


def saved_bytes(problem: Problem) -> int:
    """Bytes of maps kept for backward: x as it came."""
    inputs = math.prod(problem.shape) * problem.input_dtype.itemsize if problem.grad else 0
    return inputs + mixed.saved_bytes(problem)


def transient_bytes(problem: Problem) -> int:
    """Bytes of maps that a step holds at most besides what it keeps, its output and its gradients among them."""
    dtype = convolution_dtype(problem.dtype, problem.device)
    maps = mixed.inner(problem).normalised_maps * problem.map_bytes(dtype)[1]
    return maps + branches.transient_bytes(problem)


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros)."""
    return mixed.forward(_forward, x, step)


def _forward(x: Tensor, step: Step) -> Tensor:
    size = step.geometry.output_size(x.shape[2], x.shape[3])
    inputs = branches.inputs_of(x, step)
    if not torch.compiler.is_compiling():
        config = branches.config_of(
            step.geometry, inputs.branches, inputs.eps, len(inputs.gammas), inputs.dtype, x.device.type
        )
        if node.suits(config, x, inputs):
            return node.run(config, x, inputs, False)
    if torch.compiler.is_exporting():  # so that the operator is given no dtype, as in branches._composed
        x = x.to(inputs.dtype)
    arguments = (
        x,
        inputs.weights,
        inputs.gammas,
        inputs.betas,
        inputs.eps,
        ops.pack_taps(inputs.branches),
        ops.pack(step.geometry),
        None if inputs.dtype == x.dtype else inputs.dtype,
        prefers_channels_last(x, inputs.weights[0]),
    )
    count = x.shape[0] * size[0] * size[1]
    update = functools.partial(update_running, inputs.norms, count=count, biases=inputs.biases)
    return nodes.run(_RECORDED, arguments, update)


def _definition(ctx: Any) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x, _, _, *tensors = ctx.saved_tensors
    eps, taps, geometry = ctx.constants
    affine = len(tensors) - len(ctx.need_weights)
    config = branches.config_of(ops.unpack(geometry), ops.unpack_taps(taps), eps, affine, ctx.dtype, x.device.type)
    return functools.partial(config.definition, x, *tensors), [x, *tensors]


_RECORDED = nodes.Recorded(ops.recompute_step, ops.setup, ops.backward, _definition)


@torch.library.impl("acnet_kernels::recompute_step", ("CPU", "CUDA"))
@checked(ops.check_step)
def _step(
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
    dtype = x.dtype if dtype is None else dtype
    config = branches.config_of(ops.unpack(geometry), ops.unpack_taps(taps), eps, len(gammas), dtype, x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        if _has_triton(x) and config.is_triton:
            out, means, variances, rstds = _without_maps(x, weights, gammas, betas, config)
        else:
            out, _, means, variances, rstds = config.forward(x, tuple(weights), gammas, betas)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return out.to(dtype).contiguous(memory_format=layout), means, variances, rstds


def _has_triton(x: Tensor) -> bool:
    """Whether the Triton pass computes these statistics: on CUDA, but for float64."""
    return x.is_cuda and x.dtype != torch.float64 and TRITON


def _without_maps(
    x: Tensor, weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor], config: branches.StepConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, means, variances, rstds); no y_b is ever in memory. out is of the convolutions' dtype or wider."""
    x, geometry = x.to(config.conv_dtype), config.geometry
    kernels = [weight.to(config.conv_dtype) for weight in weights]
    means, variances, rstds = _triton_statistics(x, kernels, config)
    scale = rstds * torch.stack(gammas) if gammas else rstds
    top = scale.abs().amax(0)
    top = torch.where(top > 0, top, 1)
    wide = bn_sum.accumulation_dtype(x.dtype)
    folded = _folded(kernels, scale / top, config).to(x.dtype)
    place = geometry.placement(geometry.whole)
    z = F.conv2d(x, folded, None, geometry.stride, place.padding, place.dilation, geometry.groups)
    # The mean that this convolution's own rounding gives: as in a batch norm, a level much larger than the spread
    # cancels exactly.
    mean = _statistics_of([z], [1.0])[0][0]
    centre = mean.to(wide)
    shift = top * (centre - mean)
    for beta in betas:
        shift += beta
    centre, top, shift = (t.to(wide)[:, None, None] for t in (centre, top, shift))
    return z.to(wide).sub_(centre).mul_(top).add_(shift), means, variances, rstds


def _triton_statistics(
    x: Tensor, kernels: list[Tensor], config: branches.StepConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(means, variances, rstds) of every y_b, B×K float64, in two launches."""
    from ..ops import triton_conv  # Triton is slow to import, and only CUDA needs it
    from ..ops.triton_bn_sum import merge_statistics

    taps = [taps for taps, _ in config.branches]
    if config.is_summed:
        kernels, taps = [config.merged(kernels)], [config.geometry.whole]
    x = x.contiguous(memory_format=torch.channels_last)
    weights = [weight.contiguous(memory_format=torch.channels_last) for weight in kernels]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _, moments = triton_conv.conv_forward(x, weights, triton_conv.Window.of(config.geometry, taps), store=False)
        norms = merge_statistics(moments, [], [], config.eps)
    return norms.means, norms.variances, norms.rstds


def _statistics_of(ys: list[Tensor], eps: list[float]) -> tuple[Tensor, Tensor]:
    """(means, rstds) of CUDA maps, B×K float64."""
    if not all(y.is_contiguous(memory_format=torch.channels_last) for y in ys):
        _, means, _, rstds = bn_sum.bn_sum_forward(ys, [], [], eps, [], None)
        return means, rstds
    from ..ops import triton_bn_sum  # Triton is slow to import, and only CUDA needs it

    with torch.cuda.device_of(ys[0]):  # Triton launches on the current device
        norms = triton_bn_sum.merge_statistics(triton_bn_sum.statistics(ys), [], [], eps)
    return norms.means, norms.rstds


def _folded(kernels: list[Tensor], scale: Tensor, config: branches.StepConfig) -> Tensor:
    """Σ_b scale_b·W_b, at least float32; scale is B×K, or 1×K of all."""
    wide = bn_sum.accumulation_dtype(kernels[0].dtype)
    rows = scale.to(wide).expand(len(kernels), -1)
    scaled = [weight.to(wide) * row[:, None, None, None] for weight, row in zip(kernels, rows, strict=True)]
    return merge_kernels(scaled, [taps for taps, _ in config.branches], config.geometry)


@torch.library.impl("acnet_kernels::recompute_step_backward", ("CPU", "CUDA"))
@checked(ops.check_backward)
def _step_backward(
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
    dtype = bn_sum.accumulation_dtype(grad.dtype)
    none = means.new_empty(0, dtype=dtype)
    if not (need_x or any(need_weights) or need_gammas):
        return x.new_empty(0), [], none, grad.sum((0, 2, 3), dtype=dtype)
    config = branches.config_of(
        ops.unpack(geometry), ops.unpack_taps(taps), eps, len(gammas), grad.dtype, x.device.type
    )
    needs_dy = config.needs_dy(need_x, need_weights)
    with torch.autocast(x.device.type, enabled=False):
        ys = config.maps(x, tuple(weights))
        if (
            _has_triton(x) and config.is_triton
        ):  # forward's are of another kernel's maps: what that rounds otherwise, times Σg, is no dγ
            means, rstds = _statistics_of(ys, eps)
        like = bn_sum.like(grad, ys[0])
        kept = ys if config.is_summed else [y for y, (_, own) in zip(ys, config.branches, strict=True) if own]
        dys, dgammas, dbeta = config.map_gradients(like, x, kept, means, rstds, gammas, needs_dy, True)
        dx, dws = branches.convolution_gradients(config, dys, x, tuple(weights), need_x, tuple(need_weights))
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
