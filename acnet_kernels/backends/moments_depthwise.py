"""`moments` where every channel is a group of its own: one pass over the maps, whatever the number of branches.

A channel's batch statistics are a quadratic form in its patches' second moments, 13 sums for a 3×3 kernel. So the
step is one reading of x for the moments, one convolution, one weight gradient, and one input gradient whose stencil
includes the statistics' share: dx = Wᵀ * g − B * x + what the constants leave, B of (2k−1)² taps, with a table of
its own for every kind of border pixel. Any stride, dilation and zero padding (docs/depthwise.md).

This file has the operators' kernels in plain PyTorch, by the definition in float64; csrc/depthwise.cpp has the
CPU's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from ..geometry import Geometry
from ..ops import depthwise as ops
from ..ops import recompute
from ..ops._extension import LOADED
from ..ops.bn_sum import accumulation_dtype, rstds_of
from ..ops.check import checked
from ..spec import SUM, Problem, Step, prefers_channels_last
from . import branches, nodes
from .batchnorm import update_running


def computes(geometry: Geometry, channels: int, out_channels: int, device: str) -> bool:
    """Whether these operators compute steps of this geometry; not on CUDA, for which they have no fast kernels."""
    return (
        geometry.groups == channels
        and device != "cuda"
        and max(geometry.kernel) <= ops.MOST_TAPS
        and max(geometry.padding) <= ops.MOST_PADDING
        and out_channels <= ops.MOST_MULTIPLIER * channels
    )


def is_fastest(problem: Problem) -> bool:
    """Whether no other way to compute the problem is as fast, wherever this one computes it: on a CPU, in C++."""
    geometry = problem.geometry
    return (
        LOADED
        and problem.device == "cpu"
        and computes(geometry, problem.shape[1], problem.out_channels, problem.device)
    )


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for backward: x, padded where it must be, and some numbers for each tap and each batch norm."""
    problem = problem.explicit()
    taps, norms = math.prod(problem.geometry.kernel), len(problem.batch_stats)
    numbers = taps
    if problem.norm != SUM:
        shapes = zip(problem.branches, problem.convolved, strict=True)
        numbers = sum(own.rows * own.columns if convolved else 1 for own, convolved in shapes)
    wide = torch.promote_types(problem.dtype, torch.float32).itemsize
    per_output = 2 * 8 * norms + wide * numbers
    return problem.input_bytes + problem.shape[1] * 8 * (1 + taps) + problem.out_channels * per_output


def transient_bytes(problem: Problem) -> int:
    """Bytes that a step holds at most besides what it keeps, its output and its gradients among them."""
    problem = problem.explicit()
    rows, columns = problem.geometry.kernel
    taps = rows * columns
    kinds = (2 * rows - 1) * (2 * columns - 1)  # of pixels, about
    sums = 8 * problem.shape[1] * kinds * (kinds // 2 + 1)  # of every task, of which there may be several a channel
    forward = problem.output_bytes + sums
    if not problem.grad:
        return forward
    return max(forward, problem.input_bytes + 8 * problem.shape[1] * (taps + 1) * taps)


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros)."""
    inputs = branches.inputs_of(x, step)
    x = x.to(inputs.dtype)
    arguments = (
        x,
        inputs.weights,
        inputs.gammas,
        inputs.betas,
        inputs.eps,
        recompute.pack_taps(inputs.branches),
        recompute.pack(step.geometry),
        prefers_channels_last(x, inputs.weights[0]),
    )
    count = x.shape[0] * math.prod(step.geometry.output_size(x.shape[2], x.shape[3]))
    update = functools.partial(update_running, inputs.norms, count=count, biases=inputs.biases)
    return nodes.run(_RECORDED, arguments, update)


def _definition(ctx: Any) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x, _, _, _, _, _, *tensors = ctx.saved_tensors
    eps, taps, geometry = ctx.constants
    config = branches.config_of(
        recompute.unpack(geometry),
        recompute.unpack_taps(taps),
        eps,
        len(tensors) - len(ctx.need_weights),
        x.dtype,
        x.device.type,
    )
    return functools.partial(config.definition, x, *tensors), [x, *tensors]


_RECORDED = nodes.Recorded(ops.depthwise_step, ops.setup, ops.backward, _definition)


# ---- in plain PyTorch ----


class _Plain:
    """The kernels that have a batch norm, in float64 and as whole ones, and what they see of x."""

    def __init__(self, x: Tensor, weights: list[Tensor], norms: int, taps: list[int], geometry: list[int]) -> None:
        self.x, self.geometry = x.double(), recompute.unpack(geometry)
        self.rows, self.columns = self.geometry.output_size(x.shape[2], x.shape[3])
        self.taps = math.prod(self.geometry.kernel)
        self.values = max(x.shape[0] * self.rows * self.columns, 1)
        given, self.places = iter(weights), []
        kernels: list[Tensor] = []
        index = torch.arange(self.taps, device=x.device).view(self.geometry.kernel)
        for own, convolved in recompute.unpack_taps(taps):
            places = index[own.slices].flatten()
            kernel = self.x.new_zeros(weights[0].shape[0], self.taps)
            kernel[:, places] = next(given).double().flatten(1) if convolved else 1.0
            kernels.append(kernel)
            self.places.append(places)
        self.branch_places = self.places
        if norms < len(kernels):
            kernels, self.places = [torch.stack(kernels).sum(0)], [index.flatten()]
        self.kernels = kernels

    def as_weight(self, kernel: Tensor) -> Tensor:
        """K×taps → K×1×rows×columns."""
        return kernel.view(-1, 1, *self.geometry.kernel)

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        g = self.geometry
        return F.conv2d(x, self.as_weight(kernel), None, g.stride, g.padding, g.dilation, g.groups)

    def seen(self) -> Iterator[Tensor]:
        """Of every tap the pixels it sees, N×C×rows×columns of the output."""
        (down, right), (by, along), (p, q), (dil, at) = (
            self.geometry.kernel,
            self.geometry.stride,
            self.geometry.padding,
            self.geometry.dilation,
        )
        padded = F.pad(self.x, (q, q, p, p))
        for i in range(down):
            for j in range(right):
                rows = slice(i * dil, i * dil + by * (self.rows - 1) + 1, by)
                yield padded[:, :, rows, j * at : j * at + along * (self.columns - 1) + 1 : along]

    def sums(self) -> Tensor:
        """C×taps."""
        return torch.stack([seen.sum((0, 2, 3)) for seen in self.seen()], 1)

    def products(self, y: Tensor) -> Tensor:
        """Σ_p y[p]·x[p, t], K×taps."""
        m = y.shape[1] // self.x.shape[1]
        return torch.stack([(y * seen.repeat_interleave(m, 1)).sum((0, 2, 3)) for seen in self.seen()], 1)


def _per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


@checked(ops.check_statistics)
def _statistics(
    x: Tensor, weights: list[Tensor], eps: list[float], taps: list[int], geometry: list[int]
) -> tuple[Tensor, ...]:
    plain = _Plain(x, weights, len(eps), taps, geometry)
    means, variances, centred = [], [], []
    for kernel, places in zip(plain.kernels, plain.places, strict=True):
        y = plain.convolve(plain.x, kernel)
        mean = y.sum((0, 2, 3)) / plain.values
        y = y - _per_channel(mean)
        means.append(mean)
        variances.append(y.square().sum((0, 2, 3)) / plain.values)
        centred.append(plain.products(y)[:, places])
    return (
        torch.stack(means),
        torch.stack(variances),
        plain.x.new_zeros(x.shape[1]),
        plain.sums(),
        torch.cat(centred, 1).to(accumulation_dtype(x.dtype)),
    )


@checked(ops.check_apply)
def _apply(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    taps: list[int],
    geometry: list[int],
    channels_last: bool,
) -> Tensor:
    plain = _Plain(x, weights, len(means), taps, geometry)
    out = plain.x.new_zeros(())
    for b, kernel in enumerate(plain.kernels):
        y = plain.convolve(plain.x, kernel) - _per_channel(means[b])
        out = out + y * _per_channel(gammas[b].double() * rstds[b] if gammas else rstds[b])
        out = out + _per_channel(betas[b].double()) if betas else out
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(out.shape, dtype=x.dtype, device=x.device, memory_format=layout).copy_(out)


@checked(ops.check_step)
def _step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    channels_last: bool,
) -> tuple[Tensor, ...]:
    means, variances, pivot, *rest = _statistics(x, weights, eps, taps, geometry)
    rstds = rstds_of(variances, eps)
    out = _apply(x, weights, gammas, betas, means, rstds, pivot, taps, geometry, channels_last)
    return out, means, variances, rstds, pivot, *rest


@checked(ops.check_backward)
def _step_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    sums: Tensor,
    centred: Tensor,
    averages: Tensor | None,
    taps: list[int],
    geometry: list[int],
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    dtype, m = accumulation_dtype(x.dtype), grad.shape[1] // x.shape[1]
    plain, g = _Plain(x, weights, len(means), taps, geometry), grad.double()
    products, dbeta = plain.products(g), g.sum((0, 2, 3))
    sums = sums.repeat_interleave(m, 0)
    offset = dbeta / plain.values if averages is None else averages[-1]
    dgammas, dkernels, dx = [], [], plain.x.new_zeros(())
    parts = centred.double().split([len(places) for places in plain.places], 1)
    for b, (kernel, places) in enumerate(zip(plain.kernels, plain.places, strict=True)):
        dgamma = rstds[b] * ((kernel * products).sum(1) - means[b] * dbeta)
        dgammas.append(dgamma)
        scale = rstds[b] * gammas[b].double() if gammas else rstds[b]
        factor = (dgamma / plain.values if averages is None else averages[b]) * rstds[b]
        dkernel = products - offset[:, None] * sums
        dkernel[:, places] -= factor[:, None] * parts[b]
        dkernels.append(scale[:, None] * dkernel)
        if need_x:
            y = plain.convolve(plain.x, kernel) - _per_channel(means[b])
            dy = _per_channel(scale) * (g - _per_channel(offset) - _per_channel(factor) * y)
            geo = plain.geometry
            dx = dx + conv2d_input(
                x.shape, plain.as_weight(kernel), dy, geo.stride, geo.padding, geo.dilation, geo.groups
            )
    dws, given = [], iter(zip(weights, need_weights, strict=True))
    for b, ((_, convolved), places) in enumerate(
        zip(recompute.unpack_taps(taps), plain.branch_places, strict=True)
    ):
        if convolved:
            weight, need = next(given)
            dkernel = dkernels[b if len(dkernels) > 1 else 0]
            if need:
                dws.append(torch.empty_like(weight).copy_(dkernel[:, places].view(weight.shape)))
    return (
        torch.empty_like(x).copy_(dx) if need_x else x.new_empty(0),
        dws,
        torch.stack(dgammas).to(dtype) if need_gammas else dbeta.new_empty(0, dtype=dtype),
        dbeta.to(dtype),
    )


_KERNELS = {
    "depthwise_statistics": _statistics,
    "depthwise_apply": _apply,
    "depthwise_step": _step,
    "depthwise_step_backward": _step_backward,
}
for _device in ("CUDA",) if LOADED else ("CPU", "CUDA"):
    for _name, _kernel in _KERNELS.items():
        ops.LIBRARY.impl(_name, _kernel, _device)
