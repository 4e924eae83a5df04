"""The algebra of a block's batch statistics and gradients on second moments of its input, in small matrices.

For a k×k convolution of stride 1 and "same" zero padding (r = k//2), with P the matrix of zero-padded patches
(one row an output pixel, k²·C columns), everything a batch norm needs of y = W * x is in S = Σ_p P_p and
G = PᵀP:  Σ y = W̃S and Σ y² = diag(W̃GW̃ᵀ). Neither needs patches:

* G[t,t'] is the autocorrelation R[t'−t] less the output pixels outside the image. Those form four strips
  (one-dimensional autocorrelations of the r outermost rows and columns) and, counted twice by them, four corners.
* The gradient's term Σ_b Wᵀ_b * (D_b · (W_b * x)) is the same table read backwards: one (2k−1)×(2k−1)
  convolution of x, less one-dimensional ones of the strips, plus one matrix a corner.

Inputs are centred by a pivot c per channel, x = x̃ + c inside the image, so that a mean far above the spread does
not cancel; the constant's patch sums are counts of pixels, centred and added back in float64 (`patch_moments`).

Shapes: g groups of C/g = Cg inputs; taps are (row, column) indices 0…k−1, r the centre; "patch order" is
(row tap, column tap, channel). Strips come in the order top, bottom, left, right, their index 0 the outermost line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = 4  # top, bottom, left, right


class PatchMoments(NamedTuple):
    """Sums over the M patches of an input, in float64.

    Attributes:
        sums: S, g×(k²·Cg), in patch order.
        gram: G − SSᵀ/M, of the patches about their mean, g×(k²·Cg)×(k²·Cg).
        pixels: M = N·H·W.
    """

    sums: Tensor
    gram: Tensor
    pixels: int


def mirrored(half: Tensor, size: int) -> Tensor:
    """All shifts of an autocorrelation from the half that starts at shift 0: n×g×Cg×Cg → g×size×size×Cg×Cg.

    R[−d] = R[d]ᵀ, and in raster order of the shifts −d is as far before the centre as d is behind it.
    """
    full = torch.cat([half[1:].flip(0).mT, half])
    return full.movedim(0, 1).unflatten(1, (-1, size))


def edge_strips(x: Tensor, pivot: Tensor, k: int, groups: int) -> Tensor:
    """The r outermost lines of each side of x − pivot, zero where there are none: N×L×4×g×r×Cg.

    Lines run along their side; L = max(H, W) + r, so at least the last r places of each are zero.
    """
    n, c, h, w = x.shape
    r = k // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    strips = torch.zeros(n, max(h, w) + r, SIDES, groups, r, c // groups, dtype=dtype, device=x.device)
    rows, columns = min(r, h), min(r, w)
    centre = pivot.view(groups, -1)
    pixels = x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))  # N×H×W×g×Cg
    for i in range(rows):
        torch.sub(pixels[:, i], centre, out=strips[:, :w, 0, :, i])
        torch.sub(pixels[:, h - 1 - i], centre, out=strips[:, :w, 1, :, i])
    for i in range(columns):
        torch.sub(pixels[:, :, i], centre, out=strips[:, :h, 2, :, i])
        torch.sub(pixels[:, :, w - 1 - i], centre, out=strips[:, :h, 3, :, i])
    return strips


def corner_blocks(strips: Tensor, width: int) -> Tensor:
    """The r×r corner pixels from `edge_strips`, outermost first: N×2×2×g×r×r×Cg, (top, bottom)×(left, right)."""
    r, last = strips.shape[4], strips.shape[1] - 1
    near = list(range(r))
    far = [width - 1 - i if i < width else last for i in range(r)]  # `last` is a zero place
    left, right = strips[:, near, :2], strips[:, far, :2]  # N×r×2×g×r×Cg
    return torch.stack([left, right]).permute(1, 3, 0, 4, 5, 2, 6)


def assemble_gram(plane: Tensor, strips: Tensor, corners: Tensor, k: int) -> Tensor:
    """G of centred patches, g×(k²·Cg)×(k²·Cg) float64.

    Args:
        plane: autocorrelation R[d], g×(2k−1)×(2k−1)×Cg×Cg.
        strips: that of `edge_strips`, 4×g×(2k−1)×r×r×Cg×Cg: shift, line of the fixed pixel, of the shifted one.
        corners: Gram matrices of `corner_blocks`, 2×2×g×(r·r·Cg)×(r·r·Cg).
    """
    r, (g, c) = k // 2, (plane.shape[0], plane.shape[-1])
    shift = torch.arange(k, device=plane.device)
    shift = shift[None, :] - shift[:, None] + k - 1  # t'−t, from index 0
    whole = plane.new_empty(g, k, k, c, k, k, c, dtype=torch.float64)
    gram = whole.permute(0, 1, 2, 4, 5, 3, 6)  # g×tr×tc×t'r×t'c×c×c'
    gram.copy_(plane[:, shift[:, None, :, None], shift[None, :, None, :]])
    bands = strips.double()[:, :, shift].permute(0, 1, 4, 5, 2, 3, 6, 7)  # 4×g×i×i'×t×t'×c×c'
    blocks = corners.double().reshape(2, 2, g, r, r, c, r, r, c).permute(0, 1, 2, 3, 4, 6, 7, 5, 8)
    for j in range(1, r + 1):
        n = r - j + 1
        for side, outer in enumerate(_outer_taps(r, j)):
            band = _facing(bands[side, :, :n, :n], side, (1, 2))
            gram[:, outer, :, outer] -= band.permute(0, 1, 3, 2, 4, 5, 6)
            band = _facing(bands[2 + side, :, :n, :n], side, (1, 2))
            gram[:, :, outer, :, outer] -= band.permute(0, 3, 1, 4, 2, 5, 6)
        for i in range(1, r + 1):
            m = r - i + 1
            for v, rows in enumerate(_outer_taps(r, j)):
                for u, columns in enumerate(_outer_taps(r, i)):
                    block = blocks[v, u, :, :n, :m, :n, :m]
                    block = _facing(_facing(block, v, (1, 3)), u, (2, 4))
                    gram[:, rows, columns, rows, columns] += block
    return whole.view(g, k * k * c, k * k * c)


def scatter_composite(composite: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transpose of `assemble_gram`: what convolves x, its edge strips and its corners.

    Args:
        composite: symmetric T[(t,c),(t',c')] = Σ_b W̃_b[t,c]ᵀ D_b W̃_b[t',c'], g×(k²·Cg)×(k²·Cg).

    Returns:
        (plane, strips, corners): weights (g·Cg)×Cg×(2k−1)×(2k−1) for F.conv2d; (4·g·r·Cg)×(r·Cg)×(2k−1) for
        F.conv1d on lines in the order side, group, line, channel; 2×2×g×(r·r·Cg)×(r·r·Cg), inputs first.
    """
    r, g = k // 2, composite.shape[0]
    c = composite.shape[-1] // (k * k)
    taps = composite.reshape(g, k, k, c, k, k, c).permute(0, 1, 2, 4, 5, 3, 6)  # g×tr×tc×t'r×t'c×c×c'
    shift = torch.arange(k, device=composite.device)
    shift = shift[:, None] - shift[None, :] + k - 1  # t−t', from index 0: the input pixel less the output's
    onehot = F.one_hot(shift, 2 * k - 1).to(composite.dtype)  # t×t'×d
    lines = torch.einsum("xzd,gyxwzab->gywdab", onehot, taps)  # g×tr×t'r×dc×c×c'
    columns = torch.einsum("ywd,gyxwzab->gxzdab", onehot, taps)  # g×tc×t'c×dr×c×c'
    plane = torch.einsum("ywe,gywdab->gbaed", onehot, lines).reshape(g * c, c, 2 * k - 1, 2 * k - 1)
    strips = composite.new_zeros(SIDES, g, r, r, 2 * k - 1, c, c)
    corners = composite.new_zeros(2, 2, g, r, r, r, r, c, c)
    for j in range(1, r + 1):
        n = r - j + 1
        for side, outer in enumerate(_outer_taps(r, j)):
            strips[side, :, :n, :n] += _facing(lines[:, outer, outer], side, (1, 2))
            strips[2 + side, :, :n, :n] += _facing(columns[:, outer, outer], side, (1, 2))
        for i in range(1, r + 1):
            m = r - i + 1
            for v, rows in enumerate(_outer_taps(r, j)):
                for u, cols in enumerate(_outer_taps(r, i)):
                    block = _facing(_facing(taps[:, rows, cols, rows, cols], v, (1, 3)), u, (2, 4))
                    corners[v, u, :, :n, :m, :n, :m] += block
    # 4×g×i×i'×d×c×c' → outputs (i',c'), inputs (i,c)
    strips = strips.permute(0, 1, 3, 6, 2, 5, 4).reshape(SIDES * g * r * c, r * c, 2 * k - 1)
    corners = corners.permute(0, 1, 2, 3, 4, 7, 5, 6, 8).reshape(2, 2, g, r * r * c, r * r * c)
    return plane, strips, corners


def _outer_taps(r: int, j: int) -> tuple[slice, slice]:
    # Taps by which an output pixel j beyond the (top or left, bottom or right) edge reaches the image.
    return slice(r + j, 2 * r + 1), slice(0, r - j + 1)


def _facing(band: Tensor, far: int, dims: tuple[int, int]) -> Tensor:
    # At the far edge (bottom, right) taps ascend towards the edge's outermost line, so lines descend.
    return band.flip(dims) if far else band


def inside_counts(size: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis: which pixels a pair of taps sees, and each tap alone, in float64.

    Returns:
        pairs: k×k×size, 1 where pixel q, seen by tap t from output pixel p = q−t, has p inside and p+t' inside.
        single: k×size, 1 where pixel p sees a pixel inside by tap t.
    """
    tap = torch.arange(k, device=device) - k // 2
    q = torch.arange(size, device=device)
    output = q - tap[:, None]  # t×q
    other = output[:, None] + tap[None, :, None]  # t×t'×q
    inside = (output >= 0) & (output < size)
    pairs = inside[:, None] & (other >= 0) & (other < size)
    seen = q + tap[:, None]
    return pairs.double(), ((seen >= 0) & (seen < size)).double()


def patch_moments(gram: Tensor, total: Tensor, pivot: Tensor, images: int, k: int) -> PatchMoments:
    """S and G − SSᵀ/M of the patches of x = x̃ + pivot, from those of x̃.

    The pivot's share is centred before it is added: it is exactly 0 where no patch has padding, so that a mean
    however far above the spread costs nothing. Taps that never see the image together are exactly 0 too.

    Args:
        gram: G of x̃, from `assemble_gram`; overwritten.
        total: Σ_n x̃[n], C×H×W.
        pivot: C.
        images: N.
    """
    g = gram.shape[0]
    h, w = total.shape[1:]
    rows, one_row = inside_counts(h, k, total.device)
    columns, one_column = inside_counts(w, k, total.device)
    # Σ_p x̃[p+t]·[p+t' inside], and the number of p with p+t and p+t' inside
    mixed = torch.einsum("abq,cqs,xys->caxby", rows, total.double(), columns).reshape(g, -1, k * k, k * k)
    pixels = images * torch.einsum("ap,bp,xs,ys->axby", one_row, one_row, one_column, one_column)
    pixels = pixels.reshape(k * k, k * k)
    centre, count = k * k // 2, max(images * h * w, 1)  # by the centre tap every output pixel sees a pixel inside
    shifted, seen = mixed[..., centre], pixels[:, centre]
    if min(h, w) < k:
        gram.view(g, k * k, -1, k * k, gram.shape[-1] // (k * k)).mul_((pixels > 0)[:, None, :, None])
    flat = shifted.mT.flatten(1)
    gram.baddbmm_(flat[:, :, None], flat[:, None], alpha=-1 / count)
    mixed = mixed - shifted[..., None] * (seen / count)
    pixels = pixels - seen[:, None] * (seen / count)
    level = pivot.double().view(g, -1)
    # G − G̃ is a matrix and its transpose: x̃ with the constant, and half of the constant with itself.
    half = mixed + 0.5 * pixels * level[:, :, None, None]
    cross = torch.einsum("gctu,gd->gtcud", half, level).reshape(gram.shape)
    gram += cross
    gram += cross.mT
    sums = shifted.mT + seen[:, None] * level[:, None]
    return PatchMoments(sums.flatten(1), gram, images * h * w)


def patch_gradient_sums(total: Tensor, k: int) -> Tensor:
    """Σ_p g[p]·[p+t inside] for each tap, from Σ_n g[n] (K×H×W): K×k² float64. The centre tap's is Σ_p g[p]."""
    rows = inside_counts(total.shape[1], k, total.device)[1]
    columns = inside_counts(total.shape[2], k, total.device)[1]
    return torch.einsum("ap,kps,xs->kax", rows, total.double(), columns).flatten(1)


def constant_image(
    kernels: Tensor, pivot: Tensor, curvature: Tensor, levels: Tensor, height: int, width: int, groups: int
) -> Tensor:
    """Wᵀ * (levels − curvature·(W * x)) where x is the pivot at every pixel, "same" padding: C×H×W.

    Computed on as few pixels as have different surroundings, in kernels' dtype.

    Args:
        kernels: W, Q×(C/groups)×k×k.
        pivot: C.
        curvature, levels: Q×1×1.
    """
    k = kernels.shape[-1]
    near = 2 * (k // 2)  # further than this from the borders, all pixels are alike
    index = []
    for size in (height, width):
        q = torch.arange(size, device=kernels.device)
        index.append(torch.where(q < size - near, q.clamp_max(near), q - max(size - (2 * near + 1), 0)))
    small = (min(height, 2 * near + 1), min(width, 2 * near + 1))
    x = pivot.to(kernels.dtype)[:, None, None].expand(-1, *small)
    y = levels - curvature * F.conv2d(x, kernels, None, 1, k // 2, 1, groups)
    out = F.conv_transpose2d(y, kernels, None, 1, k // 2, 0, groups)
    return out[:, index[0][:, None], index[1]]
