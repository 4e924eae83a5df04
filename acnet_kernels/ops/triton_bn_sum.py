"""Fused batch norm and sum of up to eight maps, and what follows, on CUDA by Triton: launches of kernels/bn_sum.py.

All maps are N×K×H×W in channels_last and of one shape; fp32, fp16 or bf16. Arithmetic is fp32, the merge of
the statistics fp64. Results are the same bits in every run. bn_sum_forward, bn_sum_backward and bn_sum_backward_
compute what the operators of these names promise (ops/bn_sum.py), with a residual and an activation what those of
ops/epilogue.py do; a smooth activation, hardswish or silu, follows MOST_TOGETHER maps at most (kernels/configs.py).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import bn_sum as kernels
from ..kernels.configs import ALL_REGISTERS, cdiv, row_split, streaming_tile, sum_tile
from ..kernels.epilogue import is_smooth
from .launch import empty, empty_like, launch
from .running import NONE, Running

BLOCK_T = 1024  # partial results that a merging program reads at once


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
    partial = empty((len(ys), 2, K, tiles), torch.float32, ys[0].device)
    grid = (tiles, cdiv(K, tile.block_k))
    sizes = {"B": len(ys), "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    launch(kernels.statistics, grid, tuple(ys), partial, M, K, tiles, rows, **sizes)
    return Moments(partial, rows, M)


def merge_statistics(
    moments: Moments,
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    running: Running = NONE,
) -> Norms:
    """Merges tiles in a fixed order: one launch. γ, β: one (K,) a map, or none at all for 1 and 0.

    Running statistics move, but their counters: `apply` counts the batch.
    """
    partial = moments.partial
    B, _, K, tiles = partial.shape
    means, variances, rstds = (empty((B, K), torch.float64, partial.device) for _ in range(3))
    scale = empty((B, K), torch.float32, partial.device)
    bias = empty((K,), torch.float32, partial.device)
    launch(
        kernels.merge_statistics,
        (K, B),
        partial,
        _vectors(gammas, B),
        _vectors(betas, B),
        tuple(eps),
        means,
        variances,
        rstds,
        scale,
        bias,
        *_running(running, B),
        moments.total,
        K,
        tiles,
        moments.rows,
        B=B,
        BLOCK_T=BLOCK_T,
    )
    return Norms(means, variances, rstds, scale, bias)


def _running(running: Running, B: int) -> tuple[tuple[Any, ...], ...]:
    """What merge_statistics takes of it: four lists of tensors, and momenta as two fp32 numbers each."""
    if not running.means:
        return ((None,) * B,) * 6
    tensors = (tuple(t) or (None,) * B for t in running[:4])
    momenta = [(None, None) if momentum is None else _halves(momentum) for momentum in running.momenta]
    return (*tensors, *zip(*momenta, strict=True))


def _halves(number: float) -> tuple[float, float]:
    """Two fp32 numbers whose sum it is."""
    leading = struct.unpack("f", struct.pack("f", number))[0]
    return leading, number - leading


def _vectors(parameters: Sequence[Tensor], B: int) -> tuple[Tensor | None, ...]:
    """γ or β as the kernels take them: elements adjacent; None where there are none."""
    return tuple(t.contiguous() for t in parameters) or (None,) * B


def apply(
    ys: Sequence[Tensor],
    norms: Norms,
    dtype: torch.dtype | None = None,
    running: Running = NONE,
    residual: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """act(Σ_b scale_b·(y_b − mean_b) + bias + residual), in the maps' strides and `dtype` (None: theirs): a launch.

    The counters of `running` grow by one.
    """
    check_maps(**_named(ys=ys, residual=[] if residual is None else [residual]))
    out = empty_like(ys[0], dtype)
    M, K = pixels(out), out.shape[1]
    tile = sum_tile("apply", K, len(ys), False)
    grid = (cdiv(M, tile.block_m), cdiv(K, tile.block_k))
    sizes = {"B": len(ys), "ACTIVATION": activation, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    counters = tuple(running.counters) or (None,) * len(ys)
    vectors = (norms.means, norms.scale, norms.bias, counters)
    launch(kernels.apply, grid, tuple(ys), *vectors, residual, out, M, K, **sizes)
    return out


def bn_sum_forward(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    dtype: torch.dtype | None,
    running: Running = NONE,
    residual: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, means, variances, rstds) of act(Σ_b BN_b(y_b) + residual) by the batch's statistics: three launches.

    gammas, betas: one (K,) a map, or [] for γ = 1 and β = 0. dtype: out's, None for the maps'. The statistics: B×K,
    fp64. Running statistics and their counters are moved.
    """
    norms = merge_statistics(statistics(ys), gammas, betas, eps, running)
    out = apply(ys, norms, dtype, running, residual, activation)
    return out, norms.means, norms.variances, norms.rstds


class Following(NamedTuple):
    """What a gradient takes of an activation, '' for none: see kernels/epilogue.py for `kept`.

    g·act'(z) is written to `dresidual` unless that is None.
    """

    activation: str = ""
    betas: Sequence[Tensor] = ()
    kept: Tensor | None = None
    dresidual: Tensor | None = None


ALONE = Following()


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
    dys = [empty_like(y) for y, need in zip(ys, needs_dy, strict=True) if need]
    return dys, *bn_sum_backward_(grad, ys, means, rstds, gammas, needs_dy, dys)


def bn_sum_backward_(
    grad: Tensor,
    ys: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: Sequence[Tensor],
    needs_dy: Sequence[bool],
    dys: Sequence[Tensor],
    following: Following = ALONE,
) -> tuple[Tensor, Tensor]:
    """bn_sum_backward with dy_b written into dys, one where needs_dy[b]: y_b itself, or a map apart.

    Of grad·act'(z) where an activation follows.
    """
    activation, betas, kept, dresidual = following
    others = [t for t in (kept, dresidual) if t is not None]
    check_maps(grad=grad, **_named(ys=ys, dys=dys, following=others))
    given = iter(dys)
    targets = tuple(next(given) if need else None for need in needs_dy)
    B, (M, K), smooth = len(ys), (pixels(grad), grad.shape[1]), is_smooth(activation)
    tile = sum_tile("reduce_grad", K, B, smooth)
    tiles, rows = row_split(M, K, tile)
    partial = empty((1 + B, K, tiles), torch.float32, grad.device)
    sizes = {"B": B, "ACTIVATION": activation, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    vectors = (rstds, _vectors(gammas, B), _vectors(betas, B)) if smooth else (None, None, None)
    maps = (grad, tuple(ys), means, *vectors, kept, dresidual, partial)
    grid = (tiles, cdiv(K, tile.block_k))
    launch(kernels.reduce_grad, grid, *maps, M, K, tiles, rows, **sizes, maxnreg=ALL_REGISTERS)
    dgammas = empty((B, K), torch.float32, grad.device)
    dbeta = empty((K,), torch.float32, grad.device)
    coefficients = empty((1 + 2 * B, K), torch.float32, grad.device)
    merged = (partial, _vectors(gammas, B), rstds, dgammas, dbeta, coefficients)
    launch(kernels.merge_grad, (K, 1 + B), *merged, M, K, tiles, B=B, BLOCK_T=BLOCK_T)
    if dys:
        if dresidual is not None:  # the first pass wrote there what this one takes
            grad, activation, smooth, kept, vectors = dresidual, "", False, None, (None, None, None)
        tile = sum_tile("apply_grad", K, B, smooth)
        grid = (cdiv(M, tile.block_m), cdiv(K, tile.block_k))
        sizes = {"B": B, "ACTIVATION": activation, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
        maps = (grad, tuple(ys), targets, means, coefficients, *vectors, kept)
        registers = ALL_REGISTERS if smooth else None
        launch(kernels.apply_grad, grid, *maps, M, K, **sizes, maxnreg=registers)
    return dgammas, dbeta
