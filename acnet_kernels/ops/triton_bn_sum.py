"""Fused batch norm and sum of up to eight maps on CUDA by Triton: launches of kernels/bn_sum.py, no maths.

All maps are N×K×H×W in channels_last and of one shape; fp32, fp16 or bf16. Arithmetic is fp32, the merge of
the statistics fp64. Results are the same bits in every run. bn_sum_forward, bn_sum_backward and bn_sum_backward_
compute what the operators of these names promise (ops/bn_sum.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import bn_sum as kernels
from ..kernels.configs import cdiv, row_split, streaming_tile

BLOCK_T = 256  # partial results that a merging program reads at once


class Moments(NamedTuple):
    """Per-tile statistics of B maps: `partial`, B×2×K×tiles, is mean and M2 of `rows` rows each, `total` in all."""

    partial: Tensor
    rows: int
    total: int


class Norms(NamedTuple):
    """Batch norms of B maps: their statistics, fp64, and scale = γ·rstd, fp32, B×K each; bias = Σβ (K, fp32)."""

    means: Tensor
    variances: Tensor
    rstds: Tensor
    scale: Tensor
    bias: Tensor


def check_maps(**maps: Tensor) -> None:
    """ValueError where a map is not 4-D channels_last, or differs from the first in shape or device."""
    first_name, first = next(iter(maps.items()))
    for name, t in maps.items():
        if t.dim() != 4 or not t.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name} must be 4-D in channels_last, got shape {tuple(t.shape)} with strides {t.stride()}"
            )
        if (t.shape, t.device) != (first.shape, first.device):
            raise ValueError(
                f"{name} must have {first_name}'s shape and device, {tuple(first.shape)} on {first.device}, "
                f"got {tuple(t.shape)} on {t.device}"
            )


def _named(**lists: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{i}]": t for name, maps in lists.items() for i, t in enumerate(maps)}


def pixels(y: Tensor) -> int:
    """Rows of a map seen as a matrix: N·H·W."""
    return y.shape[0] * y.shape[2] * y.shape[3]


def statistics(ys: Sequence[Tensor]) -> Moments:
    """Per-tile mean and M2 of every map: one launch."""
    check_maps(**_named(ys=ys))
    M, K = pixels(ys[0]), ys[0].shape[1]
    tile = streaming_tile(K)
    tiles, rows = row_split(M, K, tile)
    partial = torch.empty((len(ys), 2, K, tiles), dtype=torch.float32, device=ys[0].device)
    grid = (tiles, cdiv(K, tile.block_k))
    kernels.statistics[grid](
        tuple(ys), partial, M, K, tiles, rows, B=len(ys), BLOCK_M=tile.block_m, BLOCK_K=tile.block_k
    )
    return Moments(partial, rows, M)


def merge_statistics(
    moments: Moments, gammas: Sequence[Tensor], betas: Sequence[Tensor], eps: Sequence[float]
) -> Norms:
    """Merges tiles in a fixed order: one launch. γ, β: one (K,) a map, or none at all for 1 and 0."""
    partial = moments.partial
    B, _, K, tiles = partial.shape
    means, variances, rstds = (torch.empty((B, K), dtype=torch.float64, device=partial.device) for _ in range(3))
    scale = torch.empty((B, K), dtype=torch.float32, device=partial.device)
    bias = torch.empty(K, dtype=torch.float32, device=partial.device)
    kernels.merge_statistics[(K,)](
        partial,
        _vectors(gammas, B),
        _vectors(betas, B),
        tuple(eps),
        means,
        variances,
        rstds,
        scale,
        bias,
        moments.total,
        K,
        tiles,
        moments.rows,
        B=B,
        BLOCK_T=BLOCK_T,
    )
    if 0.0 in eps:  # 1/0 is 0 there, as in nn.BatchNorm2d
        constant = (variances + variances.new_tensor(list(eps))[:, None]) == 0
        rstds.masked_fill_(constant, 0), scale.masked_fill_(constant, 0)
    return Norms(means, variances, rstds, scale, bias)


def _vectors(parameters: Sequence[Tensor], B: int) -> tuple[Tensor | None, ...]:
    """γ or β as the kernels take them: elements adjacent; None where there are none."""
    return tuple(t.contiguous() for t in parameters) or (None,) * B


def apply(ys: Sequence[Tensor], norms: Norms, dtype: torch.dtype | None = None) -> Tensor:
    """Σ_b scale_b·(y_b − mean_b) + bias, in the maps' strides and `dtype` (None: theirs): one launch."""
    check_maps(**_named(ys=ys))
    out = torch.empty_like(ys[0], dtype=dtype)
    M, K = pixels(out), out.shape[1]
    tile = streaming_tile(K)
    grid = (cdiv(M, tile.block_m), cdiv(K, tile.block_k))
    sizes = {"B": len(ys), "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    kernels.apply[grid](tuple(ys), norms.means, norms.scale, norms.bias, out, M, K, **sizes)
    return out


def bn_sum_forward(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, means, variances, rstds) of out = Σ_b BN_b(y_b) by the batch's statistics: three launches.

    gammas, betas: one (K,) a map, or [] for γ = 1 and β = 0. dtype: out's, None for the maps'. The statistics: B×K,
    fp64.
    """
    norms = merge_statistics(statistics(ys), gammas, betas, eps)
    return apply(ys, norms, dtype), norms.means, norms.variances, norms.rstds


def bn_sum_backward(
    grad: Tensor,
    ys: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: Sequence[Tensor],
    needs_dy: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(dy_b where needs_dy[b], dγ B×K, dβ K) of bn_sum_forward, the latter in fp32: three launches.

    grad is dL/dout, channels_last. Every map's dβ is the same Σ grad.
    """
    dys = [torch.empty_like(y) for y, need in zip(ys, needs_dy, strict=True) if need]
    return dys, *bn_sum_backward_(grad, ys, means, rstds, gammas, needs_dy, dys)


def bn_sum_backward_(
    grad: Tensor,
    ys: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: Sequence[Tensor],
    needs_dy: Sequence[bool],
    dys: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """bn_sum_backward with dy_b written into dys, one where needs_dy[b]: y_b itself, or a map apart."""
    check_maps(grad=grad, **_named(ys=ys, dys=dys))
    given = iter(dys)
    targets = tuple(next(given) if need else None for need in needs_dy)
    B, (M, K) = len(ys), (pixels(grad), grad.shape[1])
    tile = streaming_tile(K)
    tiles, rows = row_split(M, K, tile)
    blocks = cdiv(K, tile.block_k)
    partial = torch.empty((1 + B, K, tiles), dtype=torch.float32, device=grad.device)
    sizes = {"B": B, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    kernels.reduce_grad[tiles, blocks](grad, tuple(ys), means, partial, M, K, tiles, rows, **sizes)
    dgammas = torch.empty((B, K), dtype=torch.float32, device=grad.device)
    dbeta = torch.empty(K, dtype=torch.float32, device=grad.device)
    coefficients = torch.empty((1 + 2 * B, K), dtype=torch.float32, device=grad.device)
    kernels.merge_grad[(K,)](
        partial, _vectors(gammas, B), rstds, dgammas, dbeta, coefficients, M, K, tiles, B=B, BLOCK_T=BLOCK_T
    )
    if dys:
        grid = (cdiv(M, tile.block_m), blocks)
        kernels.apply_grad[grid](grad, tuple(ys), targets, means, coefficients, M, K, **sizes)
    return dgammas, dbeta
