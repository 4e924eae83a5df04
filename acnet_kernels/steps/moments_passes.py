"""A `moments` step in plain PyTorch, forward and backward: where the C++ extension is missing, and on CUDA."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Taps
from ..ops.autocorrelation import autocorrelation, cross_correlation
from ..ops.bn_sum import accumulation_dtype, mean_and_variance, rstds_of
from . import moments_algebra as algebra
from .convolution import add_convolution, identity_kernel, transposed_kernel
from .packed import unpack, unpack_normed, unpack_taps
from .tables import kept

PIVOT_SAMPLES = 2048
# Half-precision maps are centred only where x − pivot is exact, so only where the mean is far above the spread.
HALF_PRECISION_RATIO = 16.0
LEAST_CHANNELS_BY_BRANCH = 64  # a group: from here on a CPU's dx goes through the branches' maps
LEAST_Y_FACTOR = 1e-25  # below it products of y_factors and two kernels are beyond float32's exponents
# Pixels of a channel below which float32 products lose digits for good: their rounding does not average away, and a
# variance much smaller than its terms, got from their squares, loses twice the digits that a map's own would.
FEW_PIXELS = 256
CHUNK_BYTES = 4 << 20  # of float32 maps converted at a time: they stay in cache


class _Branch(NamedTuple):
    # A batch norm's kernel as g×(K/g)×(taps·Cg) in float64, and where its entries are in patch order (None: all).
    weight: Tensor
    entries: Tensor | None
    channels: int
    taps: Taps
    centred: bool  # without gaps, and its middle tap is the k×k kernel's

    def pick(self, patch: Tensor, dim: int) -> Tensor:
        """The branch's own taps along a dimension in patch order."""
        return patch if self.entries is None else patch.index_select(dim, self.entries)

    def embed(self, matrix: Tensor, k: int) -> Tensor:
        """g×(K/g)×(taps·Cg) → g×(K/g)×(k²·Cg), zero outside the branch's taps."""
        if self.entries is None:
            return matrix
        return matrix.new_zeros(*matrix.shape[:2], k * k * self.channels).index_copy_(2, self.entries, matrix)

    def as_kernel(self, matrix: Tensor) -> Tensor:
        """g×(K/g)×(taps·Cg) → K×Cg×rows×columns."""
        kernel = matrix.unflatten(2, (-1, self.channels)).transpose(2, 3).flatten(0, 1)
        return kernel.unflatten(2, (self.taps.rows, self.taps.columns))

    def own_kernel(self, matrix: Tensor, k: int) -> Tensor:
        """g×(K/g)×(taps·Cg) → K×Cg×rows×columns with the k×k kernel's middle tap in the middle."""
        return self.as_kernel(matrix) if self.centred else _as_conv(self.embed(matrix, k), k)


@kept(256)
def _patch_index(taps: Taps, kernel: int, channels: int, device: torch.device) -> Tensor | None:
    if taps.rows == taps.columns == kernel:
        return None
    rows, columns = (range(kernel)[own] for own in taps.slices)
    places = [row * kernel + column for row in rows for column in columns]
    return torch.tensor([tap * channels + c for tap in places for c in range(channels)], device=device)


def _branches(weights: list[Tensor], norms: int, packed: list[int], kernel: int, groups: int) -> list[_Branch]:
    # One a batch norm: a branch, or their sum.
    branches, given = [], iter(weights)
    for taps, convolved in unpack_taps(packed):
        weight = next(given) if convolved else identity_kernel(weights[0][:, :, :1, :1], groups)
        k, c, rows, columns = weight.shape
        matrix = weight.double().reshape(groups, k // groups, c, rows * columns).transpose(2, 3).flatten(2)
        index = _patch_index(taps, kernel, c, weight.device)
        middle = 2 * taps.row + rows == 2 * taps.column + columns == kernel
        branches.append(_Branch(matrix, index, c, taps, middle and taps.step == 1))
    if all(unpack_normed(packed)):
        return branches
    total = functools.reduce(torch.add, (branch.embed(branch.weight, kernel) for branch in branches))
    return [_Branch(total, None, branches[0].channels, Taps(0, 0, kernel, kernel), True)]


def pivot_of(x: Tensor) -> Tensor:
    """About the mean of each channel (C), from a sample of pixels; nothing waits for it.

    For half-precision maps 0 unless the mean is far above the spread: only then is x − pivot exact.
    """
    n, c, h, w = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_zeros(c, dtype=dtype)
    step = max(1, n * h * w // PIVOT_SAMPLES)
    rows = min(h, math.isqrt(step))
    images = min(n, -(-step // rows))
    sample = x.permute(0, 2, 3, 1)[::images, ::rows].to(dtype).reshape(-1, c)
    mean = sample.mean(0)
    if dtype == x.dtype:
        return mean
    spread = (sample - mean).abs().mean(0)
    near = ~(mean.abs() > HALF_PRECISION_RATIO * spread)  # NaN's, too
    return mean.masked_fill(near, 0).to(x.dtype).to(dtype)


def moments_of(x: Tensor, pivot: Tensor, k: int, groups: int) -> algebra.PatchMoments:
    """S and G − SSᵀ/M of x's zero-padded k×k patches."""
    if x.numel() < FEW_PIXELS * x.shape[1]:
        x, pivot = x.double(), pivot.double()
    half, total = autocorrelation(x, pivot, k - 1, k - 1, groups)
    # No other sum is beyond those of its channels' squares. A GPU, on which eager overflows too, is not waited for.
    squares = half[0].diagonal(dim1=1, dim2=2)
    if x.device.type == "cpu" and half.dtype != torch.float64 and not squares.isfinite().all():
        return moments_of(x.double(), pivot.double(), k, groups)
    strips = algebra.edge_strips(x, pivot, k, groups)
    if k == 1:  # no edges
        return algebra.patch_moments(half, half.new_empty(0), strips, total, pivot, x.shape[0], k)
    lines = strips.flatten(2).unsqueeze(1).permute(0, 3, 1, 2)  # N×(4·g·r·Cg)×1×L
    edges, _ = autocorrelation(lines, pivot.new_zeros(lines.shape[1]), 0, k - 1, algebra.SIDES * groups)
    return algebra.patch_moments(half, edges, strips, total, pivot, x.shape[0], k)


def _without_rounding(
    variance: Tensor, moments: algebra.PatchMoments, branches: list[_Branch], pivot: Tensor, eps: list[float]
) -> Tensor:
    # The variances, 0 where ε is 0 and rounding alone may have made them: of float32 maps, and of a constant pivot.
    groups, taps = moments.gram.shape[:2]
    deviation = (moments.gram.diagonal(dim1=1, dim2=2) / max(moments.pixels, 1)).clamp_min(0).sqrt()
    magnitude = pivot.double().abs().view(groups, -1).tile(taps * groups // len(pivot))
    noise = (1e-7 * deviation + 1e-13 * magnitude).unsqueeze(2)
    bounds = torch.stack([(branch.weight.abs() @ branch.pick(noise, 1)).flatten() for branch in branches])
    rows = zip(variance, bounds.square(), eps, strict=True)
    return torch.stack([row if e else row.masked_fill(row <= bound, 0) for row, bound, e in rows])


def _statistics_of_maps(x: Tensor, branches: list[_Branch], k: int, groups: int) -> tuple[Tensor, Tensor]:
    # (mean, variance), B×K float64, by the definition, for an x that is not finite: of what a branch does not see,
    # and of which means are infinite and which NaN, sums over all patches know nothing.
    found = []
    for branch in branches:
        (row, column, rows, columns, step), r = branch.taps, k // 2
        sides = r - column, column + (columns - 1) * step - r, r - row, row + (rows - 1) * step - r
        kernel = branch.as_kernel(branch.weight)
        found.append(mean_and_variance(F.conv2d(F.pad(x.double(), sides), kernel, None, 1, 0, step, groups)))
    means, variances = zip(*found, strict=True)
    return torch.stack(means), torch.stack(variances)


def statistics(moments: algebra.PatchMoments, branches: list[_Branch]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(mean B×K, biased variance B×K, W̃(G − SSᵀ/M) of each branch on its own taps), in float64."""
    products, firsts, seconds = [], [], []
    pixels = max(moments.pixels, 1)
    for branch in branches:
        gram = branch.pick(branch.pick(moments.gram, 1), 2)
        product = branch.weight @ gram
        first = branch.weight @ branch.pick(moments.sums, 1).unsqueeze(2)
        firsts.append(first.flatten())
        seconds.append((product * branch.weight).sum(2).flatten())
        products.append(product)
    return torch.stack(firsts) / pixels, (torch.stack(seconds) / pixels).clamp_min(0), products


def _gammas(gammas: list[Tensor], like: Tensor) -> Tensor:
    # B×K float64.
    return torch.stack([gamma.double() for gamma in gammas]) if gammas else torch.ones_like(like)


def step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    """moments_step."""
    known = unpack(geometry)
    kernel, groups = known.kernel[0], known.groups
    with torch.autocast(x.device.type, enabled=False):
        branches = _branches(weights, len(eps), taps, kernel, groups)
        pivot = pivot_of(x)
        if 0.0 in eps:  # which hides no rounding
            moments = moments_of(x.double(), pivot.double(), kernel, groups)
        else:
            moments = moments_of(x, pivot, kernel, groups)
        means, variances, products = statistics(moments, branches)
        if 0.0 in eps:
            variances = _without_rounding(variances, moments, branches, pivot, eps)
        if x.device.type == "cpu" and not means.isfinite().all():  # a GPU would have to be waited for
            means, variances = _statistics_of_maps(x, branches, kernel, groups)
        rstds = rstds_of(variances, eps)
        scale = _gammas(gammas, rstds) * rstds
        # With one rstd at once: the other may be as large, and the product beyond float32.
        centred = [product.flatten(0, 1) * row[:, None] for product, row in zip(products, rstds, strict=True)]
        sums, pixels = moments.sums, max(moments.pixels, 1)
        del moments, products  # as large as weights squared, and not needed beside maps
        rounded, unit = _in_range(_fuse(branches, scale, kernel), dtype)
        exact = rounded.double() if unit is None else rounded.double() * unit
        # The mean of what the rounded weights give, not of what the exact ones would: it cancels exactly.
        bias = -(exact @ sums.unsqueeze(2)).flatten() / pixels
        for beta in betas:
            bias += beta
        weight = _as_conv(rounded, kernel)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if _rounds_by_the_mean(weight.dtype, x):
            out = _centred_convolution(x, weight, unit, _as_conv(exact, kernel), bias, pivot, layout, groups)
        elif x.dtype == weight.dtype:
            out = F.conv2d(x, weight, bias.to(x.dtype), 1, kernel // 2, 1, groups).contiguous(memory_format=layout)
        else:
            shape = (x.shape[0], means.shape[1], *x.shape[2:])
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
            images = _images_at_a_time(x, out)
            wide, bias = torch.empty_like(x[:images], dtype=weight.dtype), bias.to(weight.dtype)
            for part, target in _chunks(images, x, out):
                target.copy_(F.conv2d(_converted(part, wide), weight, bias, 1, kernel // 2, 1, groups))
        return out, means, variances, rstds, pivot, sums, torch.cat(centred, 1).to(pivot.dtype)


def _centred_convolution(
    x: Tensor,
    weight: Tensor,
    unit: Tensor | None,
    exact: Tensor,
    bias: Tensor,
    pivot: Tensor,
    layout: torch.memory_format,
    groups: int,
) -> Tensor:
    # conv2d(x, weight)·unit + bias, the convolution one of x − pivot: what the pivot and the bias leave, one image,
    # cancels in float64 and is added in float32.
    image, k = bias[:, None, None], weight.shape[-1]
    if x.device.type != "cpu" or pivot.any():  # a GPU would have to be waited for
        image = image + algebra.pivot_image(exact, pivot, x.shape[2], x.shape[3], groups)
        x = torch.sub(x, _whole_image(pivot, x), out=torch.empty_like(x))
    z = F.conv2d(x, weight, None, 1, k // 2, 1, groups)
    image = image[None].to(pivot.dtype).contiguous(memory_format=layout)
    z = torch.add(z, image, out=z) if unit is None else torch.addcmul(image, z, unit, out=z)
    return z.contiguous(memory_format=layout)


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
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype,
    accumulates: bool,
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """moments_step_backward."""
    known, wide = unpack(geometry), accumulation_dtype(x.dtype)
    kernel, groups = known.kernel[0], known.groups
    none = means.new_empty(0, dtype=wide)
    if not (need_x or any(need_weights) or need_gammas):
        return x.new_empty(0), [], none, grad.sum((0, 2, 3), dtype=torch.float64).to(wide)
    with torch.autocast(x.device.type, enabled=False):
        branches = _branches(weights, len(means), taps, kernel, groups)
        products, dbeta = _patch_gradient(grad, x, pivot, kernel, groups)
        owns = [branch.pick(products, 2) for branch in branches]
        dgamma = torch.stack(
            [(own * branch.weight).sum(2).flatten() for own, branch in zip(owns, branches, strict=True)]
        )
        dgamma = rstds * (dgamma - means * dbeta)
        pixels = max(grad.shape[0] * grad.shape[2] * grad.shape[3], 1)
        y_factor, offset = dgamma / pixels, dbeta / pixels
        scale, dkernels = _gammas(gammas, rstds) * rstds, []
        if any(need_weights):
            parts = centred.split([branch.weight.shape[2] for branch in branches], 1)
            for i, (branch, own, part) in enumerate(zip(branches, owns, parts, strict=True)):
                own = own - offset.view(groups, -1, 1) * branch.pick(sums, 1)[:, None]
                dkernel = own.flatten(0, 1) - y_factor[i][:, None] * part
                dkernels.append((scale[i][:, None] * dkernel).unflatten(0, (groups, -1)))
        dx = x.new_empty(0)
        if need_x:
            y_factor = y_factor * rstds
            dx = _input_gradient(
                grad, x, pivot, branches, scale, y_factor, means, offset, kernel, groups, dtype, accumulates
            )
        dws = _weight_gradients(branches, dkernels, weights, taps, need_weights) if dkernels else []
        return dx, dws, dgamma.to(wide) if need_gammas else none, dbeta.to(wide)


def _weight_gradients(
    branches: list[_Branch], dkernels: list[Tensor], weights: list[Tensor], packed: list[int], needs: list[bool]
) -> list[Tensor]:
    # Those of the weights that need one: of a sum's kernel, each weight's own taps.
    found, given = [], iter(zip(weights, needs, strict=True))
    for i, (taps, convolved) in enumerate(unpack_taps(packed)):
        weight, need = next(given) if convolved else (None, False)
        if weight is None or not need:
            continue
        one = branches[0] if len(branches) == 1 else branches[i]
        whole = one.as_kernel(dkernels[0] if len(branches) == 1 else dkernels[i])
        rows, columns = taps.slices
        own = whole if whole.shape == weight.shape else whole[:, :, rows, columns]
        found.append(torch.empty_like(weight).copy_(own))
    return found


def _patch_gradient(grad: Tensor, x: Tensor, pivot: Tensor, k: int, groups: int) -> tuple[Tensor, Tensor]:
    # (A, Σg): Σ_p g[p]·P_pᵀ, g×(K/g)×(k²·Cg), and K, in float64.
    rows = [i // k - k // 2 for i in range(k * k)]
    columns = [i % k - k // 2 for i in range(k * k)]
    zero = pivot.new_zeros(grad.shape[1])
    products, total = cross_correlation(x, pivot, grad, zero, rows, columns, groups)
    seen = algebra.patch_gradient_sums(total, k)  # K×k²
    share = pivot.double().view(groups, 1, 1, -1) * seen.view(groups, -1, k * k, 1)
    return (products.double().permute(1, 2, 0, 3) + share).flatten(2), seen[:, k * k // 2].clone()


def _input_gradient(
    grad: Tensor,
    x: Tensor,
    pivot: Tensor,
    branches: list[_Branch],
    scale: Tensor,
    y_factor: Tensor,
    mean: Tensor,
    offset: Tensor,
    k: int,
    groups: int,
    dtype: torch.dtype,
    accumulates: bool,
) -> Tensor:
    # Σ_b of W̃ᵀ_b * (scale_b·(g − offset − slope_b·(W̃_b * x − mean_b))), the convolutions on image pixels only.
    # x is centred here too: its mean's share, one image for the batch, cancels the shifts in float64.
    images, shift = _images_at_a_time(x, grad), y_factor * mean - offset
    wide_grad = grad if grad.dtype == dtype else torch.empty_like(grad[:images], dtype=dtype)
    grad_centre = None
    if x.device.type == "cpu" and (
        branches[0].channels >= LEAST_CHANNELS_BY_BRANCH or (scale * y_factor).abs().amax() < LEAST_Y_FACTOR
    ):
        convolve = _by_branch(
            branches, scale, y_factor, shift, pivot, dtype, x[:images], grad[:images], k, groups, accumulates
        )
    else:
        if _rounds_by_the_mean(dtype, x):
            grad_centre, shift = offset.to(pivot.dtype).view(-1, 1, 1), y_factor * mean
            wide_grad = torch.empty_like(grad[:images], dtype=dtype)
        convolve = _by_composite(x, pivot, branches, scale, y_factor, shift, dtype, k, groups, accumulates)
    centre = None
    if x.device.type != "cpu" or pivot.any():  # a GPU would have to be waited for
        centre = _whole_image(pivot, x)
    wide_x = x if x.dtype == dtype and centre is None else torch.empty_like(x[:images], dtype=dtype)
    dx = torch.empty_like(x)
    for i, (part, own, target) in enumerate(_chunks(images, x, grad, dx)):
        convolve(target, _converted(part, wide_x, centre), _converted(own, wide_grad, grad_centre), i * images)
    return dx


# Writes the gradient of some images, its first argument, from their x̃ and g, and the first one's number.
_Convolutions = Callable[[Tensor, Tensor, Tensor, int], None]


def _by_branch(
    branches: list[_Branch],
    scale: Tensor,
    y_factor: Tensor,
    shift: Tensor,
    pivot: Tensor,
    dtype: torch.dtype,
    x: Tensor,
    grad: Tensor,
    k: int,
    groups: int,
    accumulates: bool,
) -> _Convolutions:
    # Each branch's own map once more, and back: 30 taps for k = 3, no algebra. For parts as large as x and grad.
    total = _sum_dtype(dtype)
    wide, scratch = torch.empty_like(x, dtype=total), torch.empty_like(grad, dtype=total)
    convolutions = []
    for branch, *factors in zip(branches, scale, -y_factor, shift, strict=True):
        kernel = branch.own_kernel(branch.weight, k)
        back, forth, shifts = (t.view(-1, 1, 1, 1) for t in factors)
        image = algebra.pivot_image(kernel * forth, pivot, x.shape[2], x.shape[3], groups) + shifts[:, 0]
        convolutions.append(
            (
                image[None].to(pivot.dtype).contiguous(memory_format=_layout(grad)),
                *_in_range(kernel * forth, dtype),
                *_in_range(transposed_kernel(kernel * back, groups), dtype),
            )
        )

    def convolve(target: Tensor, x: Tensor, grad: Tensor, first: int) -> None:
        value = target if target.dtype == wide.dtype else wide[: len(target)]
        value.zero_()
        for image, forth, forth_unit, back, back_unit in convolutions:
            padding = (forth.shape[2] // 2, forth.shape[3] // 2)
            gradient = torch.add(grad, image, out=scratch[: len(grad)])
            _add(gradient, x, forth, forth_unit, padding, groups, accumulates)
            _add(value, gradient.to(dtype), back, back_unit, padding, groups, accumulates)
        if value is not target:
            target.copy_(value)

    return convolve


def _by_composite(
    x: Tensor,
    pivot: Tensor,
    branches: list[_Branch],
    scale: Tensor,
    y_factor: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    k: int,
    groups: int,
    accumulates: bool,
) -> _Convolutions:
    # There and back in one convolution of (2k−1)² taps, besides that of g, and what it owes at the borders.
    kernels = torch.cat([branch.embed(branch.weight, k) for branch in branches], 1)  # g×(B·K/g)×(k²·Cg)
    y_factors, shifts = (
        t.view(len(branches), groups, -1).transpose(0, 1).reshape(-1, 1, 1)
        for t in (scale * y_factor, scale * shift)
    )
    constant = algebra.constant_image(
        _as_conv(kernels, k), pivot, y_factors, shifts, x.shape[2], x.shape[3], groups
    )
    constant = constant[None].to(_sum_dtype(dtype)).contiguous(memory_format=_layout(x))
    small = torch.promote_types(x.dtype, torch.float32)
    composite = kernels.to(small).mT @ (kernels * -y_factors.view(groups, -1, 1)).to(small)
    algebra.zero_unseen_(composite, x.shape[2], x.shape[3], k)
    plane, strips, corners = algebra.scatter_composite(composite, k)
    plane, plane_unit = _in_range(plane, dtype)
    weight, unit = _in_range(transposed_kernel(_as_conv(_fuse(branches, scale, k), k), groups), dtype)
    edges = _edge_terms(x, pivot, strips, corners, k, groups)

    def convolve(target: Tensor, x: Tensor, grad: Tensor, first: int) -> None:
        value = F.conv2d(grad, weight, None, 1, k // 2, 1, groups)
        value = value if unit is None else value * unit
        _add(value, x, plane, plane_unit, (k - 1, k - 1), groups, accumulates)
        algebra.add_edges(target, value, constant, edges[first : first + len(value)])

    return convolve


def _edge_terms(x: Tensor, pivot: Tensor, strips: Tensor, corners: Tensor, k: int, groups: int) -> Tensor:
    # What the (2k−1)×(2k−1) convolution of x − pivot owes to output pixels outside the image, as lines,
    # N×L×4×g×r×Cg (`edge_strips`).
    r, w = k // 2, x.shape[3]
    lines = algebra.edge_strips(x, pivot, k, groups)
    if r == 0:
        return lines
    blocks = algebra.corner_blocks(lines, w).flatten(4)
    flat = lines.flatten(2).unsqueeze(1).permute(0, 3, 1, 2)  # N×(4·g·r·Cg)×1×L
    added = F.conv2d(flat, strips.unsqueeze(2), None, 1, (0, k - 1), 1, algebra.SIDES * groups)
    added = added.permute(0, 2, 3, 1).reshape(lines.shape)
    twice = torch.einsum("nvugi,vugij->nvugj", blocks, corners).view(*blocks.shape[:4], r, r, x.shape[1] // groups)
    for v in range(2):
        for u in range(2):
            for j in range(min(r, w)):
                added[:, w - 1 - j if u else j, v].add_(twice[:, v, u, :, :, j])
    return added


def _fuse(branches: list[_Branch], scale: Tensor, k: int) -> Tensor:
    # Σ_b s_b·W̃_b, g×(K/g)×(k²·Cg).
    groups = branches[0].weight.shape[0]
    parts = [b.weight * s.view(groups, -1, 1) for b, s in zip(branches, scale, strict=True)]
    fused = branches[0].embed(parts[0], k)
    for branch, part in zip(branches[1:], parts[1:], strict=True):
        fused = fused + part if branch.entries is None else fused.index_add_(2, branch.entries, part)
    return fused


def _as_conv(matrix: Tensor, k: int) -> Tensor:
    # g×(K/g)×(k²·Cg) → K×Cg×k×k.
    return matrix.unflatten(2, (k * k, -1)).transpose(2, 3).flatten(0, 1).unflatten(2, (k, k))


def _rounds_by_the_mean(dtype: torch.dtype, x: Tensor) -> bool:
    # Whether the library's convolutions, in half precision or TF32, round so coarsely that nothing but the maps'
    # spread may go through them.
    return dtype.itemsize == 2 or (x.device.type != "cpu" and dtype == torch.float32)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    # What convolutions of this dtype are added up in: float32 where they have units (`_in_range`).
    return torch.float32 if dtype == torch.float16 else dtype


def _in_range(kernel: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    # (kernel of dtype, None); for float16 (kernel/unit, unit), unit a power of two, 1 in float32: kernels times
    # scales and y_factors may lie outside of what float16 has exponents for.
    if dtype != torch.float16:
        return kernel.to(dtype), None
    exponent = torch.frexp(kernel.abs().nan_to_num(0, 0).amax()).exponent
    unit = torch.ldexp(kernel.new_ones(1, dtype=torch.float32), (exponent - exponent.clamp(-6, 6)).clamp(-126, 127))
    return (kernel / unit).to(dtype), unit


def _add(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    unit: Tensor | None,
    padding: tuple[int, int],
    groups: int,
    accumulates: bool,
) -> None:
    # out += conv2d(x, weight·unit).
    if unit is None and accumulates:
        add_convolution(out, x, weight, padding, (1, 1), groups)
    else:
        out.addcmul_(F.conv2d(x, weight, None, 1, padding, 1, groups), out.new_ones(1) if unit is None else unit)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _whole_image(pivot: Tensor, x: Tensor) -> Tensor:
    # 1×C×H×W in x's layout: broadcasting along one dimension is slower than reading a whole image from cache.
    return pivot.view(1, -1, 1, 1).expand(1, *x.shape[1:]).contiguous(memory_format=_layout(x))


def _images_at_a_time(*maps: Tensor) -> int:
    # A CPU converts and adds a few images at a time, in cache; a GPU takes the batch whole.
    images = max(maps[0].shape[0], 1)
    if maps[0].device.type != "cpu":
        return images
    return min(images, max(1, CHUNK_BYTES // max(4 * max(math.prod(t.shape[1:]) for t in maps), 1)))


def _chunks(images: int, *maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(images) for t in maps), strict=True)


def _converted(part: Tensor, scratch: Tensor, centre: Tensor | None = None) -> Tensor:
    # part − centre in scratch's dtype.
    if centre is not None:
        return torch.sub(part, centre, out=scratch[: len(part)])
    return part if part.dtype == scratch.dtype else scratch[: len(part)].copy_(part)
