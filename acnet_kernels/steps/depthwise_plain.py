"""The depthwise operators in plain PyTorch, by the definition in float64: where nothing faster is built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from ..geometry import slices_of
from ..ops.bn_sum import accumulation_dtype, rstds_of
from ..ops.epilogue import ACTIVATIONS, activate, is_clamp, sloped, where_steep
from .packed import unpack, unpack_normed, unpack_taps


class _Plain:
    """The kernels that have a batch norm, in float64 and as whole ones, and what they see of x."""

    def __init__(self, x: Tensor, weights: list[Tensor], norms: int, taps: list[int], geometry: list[int]) -> None:
        self.x, self.geometry = x.double(), unpack(geometry)
        self.rows, self.columns = self.geometry.output_size(x.shape[2], x.shape[3])
        self.taps = math.prod(self.geometry.kernel)
        self.values = max(x.shape[0] * self.rows * self.columns, 1)
        given, self.places = iter(weights), []
        kernels: list[Tensor] = []
        normed = unpack_normed(taps)
        index = torch.arange(self.taps, device=x.device).view(self.geometry.kernel)
        for own, convolved in unpack_taps(taps):
            places = index[slices_of(own)].flatten()
            kernel = self.x.new_zeros(weights[0].shape[0], self.taps)
            kernel[:, places] = next(given).double().flatten(1) if convolved else 1.0
            kernels.append(kernel)
            self.places.append(places)
        self.branch_places = self.places
        self.kernels = [kernel for kernel, has in zip(kernels, normed, strict=True) if has]
        self.places = [places for places, has in zip(self.places, normed, strict=True) if has]
        self.nested = 0 < len(self.kernels) < norms
        self.bare = torch.zeros_like(kernels[0])  # of the branches without a batch norm of their own
        for kernel, has in zip(kernels, normed, strict=True):
            self.bare = self.bare if has else self.bare + kernel
        if len(self.kernels) < norms:
            self.kernels.append(self.bare)
            self.places.append(index.flatten())

    def is_nested_total(self, norm: int) -> bool:
        """Whether this batch norm follows the sum of branches of which some have their own."""
        return self.nested and norm == len(self.kernels) - 1

    def outermost(self) -> list[int]:
        """The batch norms of whose outputs out is the sum."""
        return [len(self.kernels) - 1] if self.nested else list(range(len(self.kernels)))

    def add_normed(self, scales: list[Tensor]) -> None:
        """Completes the nested sum's kernel, given γ·rstd (K) of every batch norm before it."""
        self.kernels[-1] = self.bare + sum(s[:, None] * k for k, s in zip(self.kernels[:-1], scales, strict=False))

    def mean(self, y: Tensor) -> Tensor:
        """Of every channel."""
        return y.sum((0, 2, 3)) / self.values

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
    means, variances, _, *rest = _statistics(_Plain(x, weights, len(eps), taps, geometry), [], [], eps, x.dtype)
    return means, variances, *rest


def _statistics(
    plain: _Plain, gammas: list[Tensor], betas: list[Tensor], eps: list[float], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """(means, variances, rstds, pivot, sums, centred); completes a nested sum's kernel."""
    means: list[Tensor] = []
    variances: list[Tensor] = []
    rstds: list[Tensor] = []
    centred: list[Tensor] = []
    for b, places in enumerate(plain.places):
        if plain.is_nested_total(b):
            plain.add_normed(_scales(gammas, rstds))
        y = plain.convolve(plain.x, plain.kernels[b])
        mean = plain.mean(y)
        y = y - _per_channel(mean)
        if plain.is_nested_total(b):  # of the sum itself, with what its batch norms add
            for c, scale in enumerate(_scales(gammas, rstds)):
                mean = mean - scale * means[c] + (betas[c].double() if betas else 0.0)
        means.append(mean)
        variances.append(y.square().sum((0, 2, 3)) / plain.values)
        rstds.append(rstds_of(variances[-1][None], eps[b : b + 1])[0])
        centred.append(plain.products(y)[:, places])
    return (
        torch.stack(means),
        torch.stack(variances),
        torch.stack(rstds),
        plain.x.new_zeros(plain.x.shape[1]),
        plain.sums(),
        torch.cat(centred, 1).to(accumulation_dtype(dtype)),
    )


def _scales(gammas: list[Tensor], rstds: Sequence[Tensor]) -> list[Tensor]:
    """γ·rstd of each of these batch norms."""
    return [gammas[b].double() * rstd if gammas else rstd for b, rstd in enumerate(rstds)]


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
    return _laid_out(_sum(plain, gammas, betas, means, rstds), x.dtype, channels_last)


def _sum(plain: _Plain, gammas: list[Tensor], betas: list[Tensor], means: Tensor, rstds: Tensor) -> Tensor:
    """Of a nested step its kernel must be complete."""
    out = plain.x.new_zeros(())
    scales = _scales(gammas, list(rstds))
    for b in plain.outermost():
        y = plain.convolve(plain.x, plain.kernels[b])
        y = y - _per_channel(plain.mean(y) if plain.is_nested_total(b) else means[b])
        out = out + y * _per_channel(scales[b])
        out = out + _per_channel(betas[b].double()) if betas else out
    return out


def _laid_out(out: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(out.shape, dtype=dtype, device=out.device, memory_format=layout).copy_(out)


def step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    channels_last: bool,
    residual: Tensor | None = None,
    activation: int = 0,
) -> tuple[Tensor, ...]:
    """depthwise_step."""
    plain = _Plain(x, weights, len(eps), taps, geometry)
    means, variances, rstds, *rest = _statistics(plain, gammas, betas, eps, x.dtype)
    z = _sum(plain, gammas, betas, means, rstds)
    z = z if residual is None else z + residual
    out = _laid_out(activate(z, ACTIVATIONS[activation]), x.dtype, channels_last)
    return out, means, variances, rstds, *rest


def step_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
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
    kept: Tensor | None = None,
    activation: int = 0,
    need_residual: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """depthwise_step_backward."""
    dtype, m = accumulation_dtype(x.dtype), grad.shape[1] // x.shape[1]
    plain, g = _Plain(x, weights, len(means), taps, geometry), grad.double()
    scales = _scales(gammas, list(rstds))
    if plain.nested:
        plain.add_normed(scales)
    if is_clamp(ACTIVATIONS[activation]):
        assert kept is not None
        g = where_steep(g, kept, ACTIVATIONS[activation])
    elif activation:
        z = _sum(plain, gammas, betas, means, rstds)
        g = sloped(g, z if kept is None else z + kept, ACTIVATIONS[activation])
    dresidual = torch.empty_like(grad).copy_(g) if need_residual else x.new_empty(0)
    products, dbeta = plain.products(g), g.sum((0, 2, 3))
    total, sums = dbeta, sums.repeat_interleave(m, 0)
    offset = dbeta / plain.values if averages is None else averages[-1]
    parts = centred.double().split([len(places) for places in plain.places], 1)
    dgammas: dict[int, Tensor] = {}
    dkernels: dict[int, Tensor] = {}
    dx = plain.x.new_zeros(())
    # The batch norm of a nested sum first: what it hands on is the sum's gradient.
    for b in reversed(range(len(plain.kernels))):
        kernel, places, geo = plain.kernels[b], plain.places[b], plain.geometry
        y = plain.convolve(plain.x, kernel)
        mean = (kernel * sums).sum(1) / plain.values if plain.is_nested_total(b) else means[b]
        dgammas[b] = rstds[b] * ((kernel * products).sum(1) - mean * total)
        factor = (dgammas[b] / plain.values if averages is None else averages[b]) * rstds[b]
        dkernel = products - offset[:, None] * sums
        dkernel[:, places] -= factor[:, None] * parts[b]
        dkernels[b] = scales[b][:, None] * dkernel
        dy = _per_channel(scales[b]) * (g - _per_channel(offset) - _per_channel(factor) * (y - _per_channel(mean)))
        if plain.is_nested_total(b):
            g, products, total, offset = dy, dkernels[b], torch.zeros_like(total), torch.zeros_like(offset)
        if need_x:
            adjoint = plain.as_weight(plain.bare if plain.is_nested_total(b) else kernel)
            dx = dx + conv2d_input(x.shape, adjoint, dy, geo.stride, geo.padding, geo.dilation, geo.groups)
    dws, given = [], iter(zip(weights, need_weights, strict=True))
    normed, own = unpack_normed(taps), iter(range(len(plain.kernels)))
    for (_, convolved), places, has in zip(unpack_taps(taps), plain.branch_places, normed, strict=True):
        dkernel = dkernels[next(own) if has else len(plain.kernels) - 1]
        if convolved:
            weight, need = next(given)
            if need:
                dws.append(torch.empty_like(weight).copy_(dkernel[:, places].view(weight.shape)))
    return (
        torch.empty_like(x).copy_(dx) if need_x else x.new_empty(0),
        dws,
        torch.stack([dgammas[b] for b in range(len(dgammas))]).to(dtype)
        if need_gammas
        else dbeta.new_empty(0, dtype=dtype),
        dbeta.to(dtype),
        dresidual,
    )
