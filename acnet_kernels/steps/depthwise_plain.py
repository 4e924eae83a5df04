"""The depthwise operators in plain PyTorch, by the definition in float64: where nothing faster is built."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from ..geometry import slices_of
from ..ops.bn_sum import accumulation_dtype, rstds_of
from .packed import unpack, unpack_taps


class _Plain:
    """The kernels that have a batch norm, in float64 and as whole ones, and what they see of x."""

    def __init__(self, x: Tensor, weights: list[Tensor], norms: int, taps: list[int], geometry: list[int]) -> None:
        self.x, self.geometry = x.double(), unpack(geometry)
        self.rows, self.columns = self.geometry.output_size(x.shape[2], x.shape[3])
        self.taps = math.prod(self.geometry.kernel)
        self.values = max(x.shape[0] * self.rows * self.columns, 1)
        given, self.places = iter(weights), []
        kernels: list[Tensor] = []
        index = torch.arange(self.taps, device=x.device).view(self.geometry.kernel)
        for own, convolved in unpack_taps(taps):
            places = index[slices_of(own)].flatten()
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


def statistics(
    x: Tensor, weights: list[Tensor], eps: list[float], taps: list[int], geometry: list[int]
) -> tuple[Tensor, ...]:
    """depthwise_statistics."""
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


def apply(
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
    """depthwise_apply."""
    plain = _Plain(x, weights, len(means), taps, geometry)
    out = plain.x.new_zeros(())
    for b, kernel in enumerate(plain.kernels):
        y = plain.convolve(plain.x, kernel) - _per_channel(means[b])
        out = out + y * _per_channel(gammas[b].double() * rstds[b] if gammas else rstds[b])
        out = out + _per_channel(betas[b].double()) if betas else out
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(out.shape, dtype=x.dtype, device=x.device, memory_format=layout).copy_(out)


def step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    channels_last: bool,
) -> tuple[Tensor, ...]:
    """depthwise_step."""
    means, variances, pivot, *rest = statistics(x, weights, eps, taps, geometry)
    rstds = rstds_of(variances, eps)
    out = apply(x, weights, gammas, betas, means, rstds, pivot, taps, geometry, channels_last)
    return out, means, variances, rstds, pivot, *rest


def step_backward(
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
    """depthwise_step_backward."""
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
    for b, ((_, convolved), places) in enumerate(zip(unpack_taps(taps), plain.branch_places, strict=True)):
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
