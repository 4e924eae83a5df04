"""Fused batch norm and sum of up to three maps on CUDA by Triton: launches of kernels/bn_sum.py, no maths.

All maps are N×K×H×W in channels_last, one shape and dtype (fp32, fp16 or bf16). Statistics, their gradients and all
arithmetic are fp32. Results are the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..kernels import bn_sum as kernels
from ..kernels.configs import row_split, streaming_tile

BLOCK_T = 256  # partial results that a merging program reads at once


class Moments(NamedTuple):
    """Per-tile statistics of B maps: `partial`, B×2×K×tiles, is mean and M2 of `rows` rows each, `total` in all."""

    partial: Tensor
    rows: int
    total: int


class Norms(NamedTuple):
    """Batch norms of B maps, fp32: mean, var (biased), rstd, scale = γ·rstd (B×K each); bias = Σβ (K)."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    scale: Tensor
    bias: Tensor


def check_maps(**maps: Tensor) -> None:
    """ValueError where a map is not 4-D channels_last, or differs from the first in shape, dtype or device."""
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


def pixels(y: Tensor) -> int:
    """Rows of a map seen as a matrix: N·H·W."""
    return y.shape[0] * y.shape[2] * y.shape[3]


def statistics(ys: Sequence[Tensor]) -> Moments:
    """Per-tile mean and M2 of every map: one launch."""
    check_maps(**{f"ys[{i}]": y for i, y in enumerate(ys)})
    M, K = pixels(ys[0]), ys[0].shape[1]
    tile = streaming_tile(K)
    tiles, rows = row_split(M, K, tile)
    partial = torch.empty((len(ys), 2, K, tiles), dtype=torch.float32, device=ys[0].device)
    grid = (tiles, triton.cdiv(K, tile.block_k))
    kernels.statistics[grid](
        tuple(ys), partial, M, K, tiles, rows, B=len(ys), BLOCK_M=tile.block_m, BLOCK_K=tile.block_k
    )
    return Moments(partial, rows, M)


def merge_statistics(
    moments: Moments,
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    eps: Sequence[float],
) -> Norms:
    """Merges tiles in a fixed order: one launch. γ, β: K each, or None for 1 and 0."""
    partial = moments.partial
    B, _, K, tiles = partial.shape
    mean, var, rstd, scale = (torch.empty((B, K), dtype=torch.float32, device=partial.device) for _ in range(4))
    bias = torch.empty(K, dtype=torch.float32, device=partial.device)
    kernels.merge_statistics[(K,)](
        partial,
        tuple(gammas),
        tuple(betas),
        tuple(eps),
        mean,
        var,
        rstd,
        scale,
        bias,
        moments.total,
        K,
        tiles,
        moments.rows,
        B=B,
        BLOCK_T=BLOCK_T,
    )
    return Norms(mean, var, rstd, scale, bias)


def apply(ys: Sequence[Tensor], norms: Norms) -> Tensor:
    """Σ_b scale_b·(y_b − mean_b) + bias, in the maps' dtype: one launch."""
    check_maps(**{f"ys[{i}]": y for i, y in enumerate(ys)})
    out = torch.empty_like(ys[0], memory_format=torch.channels_last)
    M, K = pixels(out), out.shape[1]
    tile = streaming_tile(K)
    sizes = {"B": len(ys), "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    grid = (triton.cdiv(M, tile.block_m), triton.cdiv(K, tile.block_k))
    kernels.apply[grid](tuple(ys), norms.mean, norms.scale, norms.bias, out, M, K, **sizes)
    return out


def bn_sum_forward(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    eps: Sequence[float],
) -> tuple[Tensor, Norms]:
    """out = Σ_b BN_b(y_b) by the batch's statistics: three launches."""
    norms = merge_statistics(statistics(ys), gammas, betas, eps)
    return apply(ys, norms), norms


def bn_sum_backward(
    grad: Tensor,
    ys: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    gammas: Sequence[Tensor | None],
    *,
    in_place: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(dy_b, dγ B×K, dβ B×K) of bn_sum_forward: three launches.

    Args:
        grad: dL/dout, channels_last.
        mean, rstd: B×K, as the forward returned them.
        in_place: write dy_b over y_b; nothing else may need y_b then.
    """
    check_maps(grad=grad, **{f"ys[{i}]": y for i, y in enumerate(ys)})
    B, (M, K) = len(ys), (pixels(grad), grad.shape[1])
    tile = streaming_tile(K)
    tiles, rows = row_split(M, K, tile)
    blocks = triton.cdiv(K, tile.block_k)
    partial = torch.empty((1 + B, K, tiles), dtype=torch.float32, device=grad.device)
    sizes = {"B": B, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    kernels.reduce_grad[tiles, blocks](grad, tuple(ys), mean, partial, M, K, tiles, rows, **sizes)
    dgamma, dbeta = (torch.empty((B, K), dtype=torch.float32, device=grad.device) for _ in range(2))
    coefficients = torch.empty((1 + 2 * B, K), dtype=torch.float32, device=grad.device)
    kernels.merge_grad[(K,)](
        partial, tuple(gammas), rstd, dgamma, dbeta, coefficients, M, K, tiles, B=B, BLOCK_T=BLOCK_T
    )
    dys = list(ys) if in_place else [torch.empty_like(y, memory_format=torch.channels_last) for y in ys]
    grid = (triton.cdiv(M, tile.block_m), blocks)
    kernels.apply_grad[grid](grad, tuple(ys), tuple(dys), mean, coefficients, M, K, **sizes)
    return dys, dgamma, dbeta
