"""Second moments of maps on CUDA by Triton: launches of kernels/autocorrelation.py, no maths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..kernels import configs
from ..kernels.autocorrelation import centred_total
from ..kernels.autocorrelation import cross_correlation as kernel
from ..kernels.configs import cdiv
from ..kernels.wgrad import sum_splits
from . import launch
from .check import MOST_TAPS

INTERPRETED = triton.knobs.runtime.interpret
_BLOCK = 1024  # of elements, where a kernel adds whole maps or partial results


class Raster(NamedTuple):
    """Shifts that are neighbours in raster order: places first, first + 1 … of rows of `width` columns.

    The rows begin at shift (row, column).
    """

    first: int
    row: int
    column: int
    width: int


def raster(rows: list[int], columns: list[int]) -> Raster | None:
    """The shifts as a Raster, or None where they are not one."""
    if not rows:
        return None
    left = min(columns)
    width = max(columns) - left + 1
    places = [(row - rows[0]) * width + column - left for row, column in zip(rows, columns, strict=True)]
    if places != list(range(places[0], places[0] + len(places))):
        return None
    return Raster(places[0], rows[0], left, width)


def declines(x: Tensor, rows: list[int], columns: list[int]) -> str | None:
    """Why the kernels do not take these maps or shifts, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{x.dtype} has no kernel"
    if max(map(abs, (*rows, *columns)), default=0) > MOST_TAPS:
        return f"a shift is beyond {MOST_TAPS} pixels"
    if raster(rows, columns) is None:
        return "the shifts are not neighbours in raster order"
    return None


def cross_correlation(
    x: Tensor, x_pivot: Tensor, y: Tensor, y_pivot: Tensor, rows: list[int], columns: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    """What the operator of this name promises, for channels_last maps that `declines` does not: 2 or 3 launches.

    Raises:
        ValueError: the kernels do not take the maps or the shifts; the message says why.
    """
    why = declines(x, rows, columns)
    shifts = raster(rows, columns)
    if why is not None or shifts is None:
        raise ValueError(f"cross_correlation has no Triton kernel for this: {why}")
    products, total = launch.run(routine, [x, x_pivot, y, y_pivot], len(rows), shifts, groups)
    return products, total.permute(2, 0, 1)


def routine(tensors: Sequence[Tensor], count: int, shifts: Raster, groups: int) -> list[Tensor]:
    """[products of so many shifts, total as its kernel writes it] (ops/launch.py)."""
    x, x_pivot, y, y_pivot = tensors
    N, C, H, W = x.shape
    K, M = y.shape[1], N * H * W
    CG, KG = C // groups, K // groups
    int64_offsets = max(x.numel(), y.numel()) >= 2**31
    config = configs.correlation("half" if x.dtype != torch.float32 else "ieee", int64_offsets, KG, CG)
    products = launch.empty((count, groups, KG, CG), torch.float32, x.device)
    blocks = groups * cdiv(KG, config.block_k) * cdiv(CG, config.block_c)
    splits, share = configs.pixel_split(M, blocks * count, config.block_m)
    size = products.numel()
    target = products if splits == 1 else launch.empty((splits * size,), torch.float32, x.device)
    launch.launch(
        kernel,
        (count, blocks, splits),
        x,
        x_pivot,
        y,
        y_pivot,
        target,
        M,
        share,
        size,
        *shifts,
        C,
        K,
        CG,
        KG,
        H,
        W,
        INT64_OFFSETS=int64_offsets,
        INTERPRETER_FP32=INTERPRETED and x.dtype == torch.bfloat16,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_C=config.block_c,
        **config.options,
    )
    if splits > 1:
        grid = (cdiv(size, configs.SPLIT_BLOCK), 1, 1)
        launch.launch(sum_splits, grid, (target,), (products,), (size,), splits, size, **configs.SPLIT_BLOCKS)
    total = launch.empty((H, W, K), torch.float32, x.device)
    launch.launch(centred_total, (cdiv(total.numel(), _BLOCK),), y, y_pivot, total, N, H * W, K, BLOCK=_BLOCK)
    return [products, total]
