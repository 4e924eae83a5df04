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

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tables import kept

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


def add_edges(out: Tensor, value: Tensor, constant: Tensor, edges: Tensor) -> None:
    """out = value + constant + edges, rounded to out's dtype.

    Args:
        out, value: N×C×H×W; value is overwritten.
        constant: 1×C×H×W of value's dtype.
        edges: what to add to the r outermost lines of each side, in the order of `edge_strips`.
    """
    value += constant
    h, w = value.shape[2:]
    r = edges.shape[4]
    pixels = value.permute(0, 2, 3, 1).unflatten(-1, (edges.shape[3], -1))  # N×H×W×g×Cg
    top, bottom, left, right = edges.unbind(2)
    for i in range(min(r, h)):
        pixels[:, i].add_(top[:, :w, :, i])
        pixels[:, h - 1 - i].add_(bottom[:, :w, :, i])
    for j in range(min(r, w)):
        pixels[:, :, j].add_(left[:, :h, :, j])
        pixels[:, :, w - 1 - j].add_(right[:, :h, :, j])
    out.copy_(value)


def corner_blocks(strips: Tensor, width: int) -> Tensor:
    """The r×r corner pixels from `edge_strips`, outermost first: N×2×2×g×r×r×Cg, (top, bottom)×(left, right)."""
    r = strips.shape[4]
    left, right = strips[:, :r, :2], strips[:, max(width - r, 0) : width, :2].flip(1)  # N×r×2×g×r×Cg
    if width < r:  # the last places are zero
        right = torch.cat([right, strips[:, width - r :, :2]], 1)
    return torch.stack([left, right]).permute(1, 3, 0, 4, 5, 2, 6)


@kept(32)
def axis_table(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a pair of taps adds up along one axis, by what there is to add: k²×(2k−1 + 2·r²).

    Pair (t, t') takes the sum over all pixels at shift t'−t, less the pixels by which an output pixel outside
    the image sees the inside with both: by line i with t and line i' with t', counted from the edge. Columns:
    the shifts, then (near or far edge)×i×i'.
    """
    r, span = k // 2, 2 * k - 1
    table = torch.zeros(k, k, span + 2 * r * r, dtype=dtype)
    for t, other in itertools.product(range(-r, r + 1), repeat=2):
        table[t + r, other + r, other - t + k - 1] = 1
        for far, sign in enumerate((1, -1)):
            for beyond in range(1, min(sign * t, sign * other) + 1):
                i, j = sign * t - beyond, sign * other - beyond
                table[t + r, other + r, span + (far * r + i) * r + j] = -1
    return table.flatten(0, 1).to(device)


def assemble_gram(plane: Tensor, strips: Tensor, corners: Tensor, k: int) -> Tensor:
    """G of centred patches, g×(k²·Cg)×(k²·Cg) float64.

    Args:
        plane: autocorrelation R[d], g×(2k−1)×(2k−1)×Cg×Cg.
        strips: that of `edge_strips`, 4×g×(2k−1)×r×r×Cg×Cg: shift, line of the fixed pixel, of the shifted one.
        corners: Gram matrices of `corner_blocks`, 2×2×g×(r·r·Cg)×(r·r·Cg).
    """
    r, span, (g, c) = k // 2, 2 * k - 1, (plane.shape[0], plane.shape[-1])
    table = axis_table(k, torch.float64, plane.device)
    terms = plane.new_empty(g, table.shape[1], table.shape[1], c, c, dtype=torch.float64)
    terms[:, :span, :span] = plane
    if r:
        rows = terms[:, span:, :span].view(g, 2, r, r, span, c, c)
        rows.copy_(strips[:2].permute(1, 0, 3, 4, 2, 5, 6))
        columns = terms[:, :span, span:].unflatten(2, (2, r, r))
        columns.copy_(strips[2:].permute(1, 2, 0, 3, 4, 5, 6))
        blocks = corners.view(2, 2, g, r, r, c, r, r, c).permute(2, 0, 3, 6, 1, 4, 7, 5, 8)
        terms[:, span:, span:].view(g, 2, r, r, 2, r, r, c, c).copy_(blocks)
    pairs = table @ (table @ terms.flatten(2)).unflatten(2, (-1, c * c))  # g×(rows t, t')×(columns t, t')×(c·c')
    return pairs.view(g, k, k, k, k, c, c).permute(0, 1, 3, 5, 2, 4, 6).reshape(g, k * k * c, k * k * c)


def scatter_composite(composite: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transpose of `assemble_gram`: what convolves x, its edge strips and its corners.

    Args:
        composite: symmetric T[(t,c),(t',c')] = Σ_b W̃_b[t,c]ᵀ D_b W̃_b[t',c'], g×(k²·Cg)×(k²·Cg).

    Returns:
        (plane, strips, corners): weights (g·Cg)×Cg×(2k−1)×(2k−1) for F.conv2d; (4·g·r·Cg)×(r·Cg)×(2k−1) for
        F.conv1d on lines in the order side, group, line, channel; 2×2×g×(r·r·Cg)×(r·r·Cg). The three results
        add up to Σ_b W̃ᵀ_b * (D_b · (W̃_b * x)).
    """
    r, span, g = k // 2, 2 * k - 1, composite.shape[0]
    c = composite.shape[-1] // (k * k)
    table = axis_table(k, composite.dtype, composite.device).mT
    pairs = composite.view(g, k, k, c, k, k, c).permute(0, 1, 4, 2, 5, 3, 6).reshape(g, k * k, -1)
    terms = (table @ (table @ pairs).unflatten(2, (-1, c * c))).unflatten(3, (c, c))
    plane = terms[:, :span, :span].permute(0, 3, 4, 1, 2).reshape(g * c, c, span, span)
    rows = terms[:, span:, :span].view(g, 2, r, r, span, c, c).permute(1, 0, 2, 5, 3, 6, 4)
    columns = terms[:, :span, span:].unflatten(2, (2, r, r)).permute(2, 0, 3, 5, 4, 6, 1)
    strips = torch.cat([rows, columns]).reshape(SIDES * g * r * c, r * c, span)
    blocks = terms[:, span:, span:].view(g, 2, r, r, 2, r, r, c, c).permute(1, 4, 0, 2, 5, 7, 3, 6, 8)
    return plane, strips, blocks.reshape(2, 2, g, r * r * c, r * r * c)


@kept(64)
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


def patch_moments(
    half: Tensor, edges: Tensor, strips: Tensor, total: Tensor, pivot: Tensor, images: int, k: int
) -> PatchMoments:
    """S and G − SSᵀ/M of the patches of x = x̃ + pivot, from second moments of x̃.

    The pivot's share is centred before it is added: it is exactly 0 where no patch has padding, so that a mean
    however far above the spread costs nothing. Taps that never see the image together are exactly 0 too.

    Args:
        half, edges, strips: as for `patch_gram`.
        total: Σ_n x̃[n], C×H×W.
        pivot: C.
        images: N.
    """
    g = half.shape[1]
    h, w = total.shape[1:]
    rows, columns = (inside_counts(size, k, total.device)[0].flatten(0, 1) for size in (h, w))
    # Σ_p x̃[p+t]·[p+t' inside], and the number of p with p+t and p+t' inside
    mixed = (rows @ total.permute(1, 2, 0).double().flatten(1)).unflatten(1, (w, -1))
    mixed = (columns @ mixed).view(k, k, k, k, -1)  # t_r, t'_r, t_c, t'_c, c
    mixed = mixed.permute(0, 2, 1, 3, 4).reshape(k * k, k * k, g, -1).movedim(2, 0)
    counts = pixel_counts(h, w, k, total.device)
    pixels = images * counts
    centre, count = k * k // 2, max(images * h * w, 1)  # by the centre tap every output pixel sees a pixel inside
    shifted, seen = mixed[:, :, centre], pixels[:, centre]
    pivot = pivot.double().view(g, -1)
    pixels = pixels - seen[:, None] * (seen / count)
    # G − G̃ is a matrix and its transpose: x̃ with the constant, and half of the constant with itself.
    cross = mixed - shifted[:, :, None] * (seen / count)[:, None] + 0.5 * pixels[:, :, None] * pivot[:, None, None]
    gram = patch_gram(
        half, edges, strips, shifted.flatten(1).contiguous(), cross.contiguous(), pivot, k, (h, w), count
    )
    sums = shifted + seen[:, None] * pivot[:, None]
    return PatchMoments(sums.flatten(1), gram, images * h * w)


def patch_gram(
    half: Tensor,
    edges: Tensor,
    strips: Tensor,
    sums: Tensor,
    cross: Tensor,
    pivot: Tensor,
    k: int,
    size: tuple[int, int],
    count: int,
) -> Tensor:
    """G − SSᵀ/M of patches of x = x̃ + pivot, g×(k²·Cg)×(k²·Cg) float64.

    Args:
        half: autocorrelation of x̃, its half plane from shift 0 on, n×g×Cg×Cg.
        edges: that of the lines of `edge_strips`, k×(4·g)×(r·Cg)×(r·Cg).
        strips: x̃'s, from `edge_strips`.
        sums: Σ_p x̃[p+t], g×(k²·Cg).
        cross: X[t,t',c], g×k²×k²×Cg: X[t,t',c]·pivot[c'] and its transpose are added.
        pivot: g×Cg.
        size: H, W; count: M.
    """
    g, r, span = half.shape[1], k // 2, 2 * k - 1
    plane = mirrored(half, span)
    if r == 0:
        gram = plane.double().flatten(1, 3)
    else:
        lines = mirrored(edges, span)[:, 0].unflatten(0, (SIDES, g)).unflatten(-1, (r, -1)).unflatten(-3, (r, -1))
        blocks = corner_blocks(strips, size[1]).flatten(4).double()
        corners = torch.einsum("nvugi,nvugj->vugij", blocks, blocks)
        gram = assemble_gram(plane, lines.permute(0, 1, 2, 3, 5, 4, 6), corners, k)
    zero_unseen_(gram, *size, k)
    gram.baddbmm_(sums[:, :, None], sums[:, None], alpha=-1 / count)
    product = (cross.mT.unsqueeze(-1) * pivot[:, None, None, None]).reshape(gram.shape)
    gram += product
    gram += product.mT
    return gram


def zero_unseen_(matrix: Tensor, height: int, width: int, k: int) -> None:
    """Zeroes what belongs to pairs of taps that never see the image together, in a matrix in patch order, in place.

    Those entries count for nothing, but by sums that cancel: exactly in their absence alone.
    """
    if min(height, width) < k:
        seen = pixel_counts(height, width, k, matrix.device) > 0
        matrix.view(matrix.shape[0], k * k, -1, k * k, matrix.shape[-1] // (k * k)).mul_(seen[:, None, :, None])


@kept(64)
def pixel_counts(height: int, width: int, k: int, device: torch.device) -> Tensor:
    """How many output pixels of an image see a pixel inside by both of a pair of taps: k²×k² float64."""
    rows, columns = (single @ single.mT for _, single in (inside_counts(s, k, device) for s in (height, width)))
    return torch.kron(rows, columns)


def patch_gradient_sums(total: Tensor, k: int) -> Tensor:
    """Σ_p g[p]·[p+t inside] for each tap, from Σ_n g[n] (K×H×W): K×k² float64. The centre tap's is Σ_p g[p]."""
    rows, columns = (inside_counts(size, k, total.device)[1] for size in total.shape[1:])
    lines = (rows @ total.permute(1, 2, 0).double().flatten(1)).unflatten(1, (total.shape[2], -1))
    return (columns @ lines).flatten(0, 1).mT


def constant_image(
    kernels: Tensor, pivot: Tensor, y_factor: Tensor, shifts: Tensor, height: int, width: int, groups: int
) -> Tensor:
    """Wᵀ * (shifts − y_factor·(W * x)) where x is the pivot at every pixel, "same" padding: C×H×W.

    Computed on as few pixels as have different surroundings, in kernels' dtype.

    Args:
        kernels: W, Q×(C/groups)×k×k.
        pivot: C.
        y_factor, shifts: Q×1×1.
    """
    k = kernels.shape[-1]
    near = 2 * (k // 2)  # further than this from the borders, all pixels are alike
    rows, columns = (_representatives(size, near, kernels.device) for size in (height, width))
    small = (min(height, 2 * near + 1), min(width, 2 * near + 1))
    x = pivot.to(kernels.dtype)[:, None, None].expand(-1, *small)
    y = shifts - y_factor * F.conv2d(x, kernels, None, 1, k // 2, 1, groups)
    out = F.conv_transpose2d(y, kernels, None, 1, k // 2, 0, groups)
    return out[:, rows[:, None], columns]


def pivot_image(kernels: Tensor, pivot: Tensor, height: int, width: int, groups: int) -> Tensor:
    """W * x where x is the pivot at every pixel, "same" padding: K×H×W, in kernels' dtype.

    Args:
        kernels: W, K×(C/groups)×rows×columns, both odd; pivot: C.
    """
    size, near = (height, width), [taps // 2 for taps in kernels.shape[2:]]  # further inside, all pixels are alike
    rows, columns = (_representatives(s, r, kernels.device) for s, r in zip(size, near, strict=True))
    small = [min(s, 2 * r + 1) for s, r in zip(size, near, strict=True)]
    x = pivot.to(kernels.dtype)[:, None, None].expand(-1, *small)
    return F.conv2d(x, kernels, None, 1, near, 1, groups)[:, rows[:, None], columns]


@kept(64)
def _representatives(size: int, near: int, device: torch.device) -> Tensor:
    # For every pixel of an axis, the one in a small image that is as far from the borders, as far as that matters.
    q = torch.arange(size, device=device)
    return torch.where(q < size - near, q.clamp_max(near), q - max(size - (2 * near + 1), 0))
