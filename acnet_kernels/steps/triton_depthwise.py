"""The operators of depthwise blocks on CUDA by Triton: launches of kernels/depthwise_*.py, no maths.

    depthwise_step            pivots, moments, merge, small algebra, convolution: 5 launches
    depthwise_step_backward   weight gradients' sums, merge, small algebra, correction's tables, dx: 5 launches, and
                              before hardswish or silu one more: the kernel that z is computed by again

Arguments and results are those of depthwise.py, checked there; maps are not empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import configs, depthwise_algebra, depthwise_moments, rectangles
from ..kernels.configs import Tile, cdiv, power_of_two
from ..kernels.rectangles import Rectangles
from ..kernels.window import Window
from ..ops import launch
from ..ops.epilogue import ACTIVATIONS, is_clamp
from .depthwise import numbers_of
from .moments_passes import FEW_PIXELS
from .packed import unpack, unpack_normed, without_normed
from .tables import kept

_PROGRAMS = 1024  # that a pass shares its sums among, about
_PIVOT_ROWS, _PIVOT_COLUMNS = 16, 32


class _Pass(NamedTuple):
    """How a pass over maps runs: its window, its tile, whether offsets need 64 bits, whether programs are many."""

    window: Window
    tile: Tile
    int64_offsets: bool
    blocks: int  # of channels

    @property
    def programs(self) -> int:
        """That share the pixels of one block of channels."""
        return max(1, _PROGRAMS // self.blocks)

    @property
    def options(self) -> dict[str, object]:
        """Compile-time constants and how a program is compiled."""
        window, tile = self.window, self.tile
        return {
            "WINDOW": window,
            "INT64_OFFSETS": self.int64_offsets,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "maxnreg": configs.ALL_REGISTERS,
        }


def depthwise_step(
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
    """As the operator of this name."""
    tensors, counts = _packed(x, geometry, True, weights, gammas, betas)
    given, follows = (*tensors, *_given(residual)), ACTIVATIONS[activation]
    numbers = tuple(eps), tuple(taps), tuple(geometry)
    return tuple(launch.run(_forward, given, counts, *numbers, channels_last, follows))


def depthwise_statistics(
    x: Tensor, weights: list[Tensor], eps: list[float], taps: list[int], geometry: list[int]
) -> tuple[Tensor, ...]:
    """As the operator of this name."""
    tensors, counts = _packed(x, geometry, True, weights, [], [])
    means, variances, _, *rest = launch.run(
        _forward, tensors, counts, tuple(eps), tuple(taps), tuple(geometry), None, ""
    )
    return means, variances, *rest


def depthwise_apply(
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
    """As the operator of this name."""
    lists = [[t.contiguous() for t in own] for own in (weights, gammas, betas)]
    tensors = [x, means, rstds, pivot, *(t for own in lists for t in own)]
    counts = tuple(map(len, lists))
    return launch.run(_apply, tensors, counts, tuple(taps), tuple(geometry), channels_last)[0]


def depthwise_step_backward(
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
    """As the operator of this name."""
    tensors, counts = _packed(x, geometry, False, weights, gammas, betas, _given(averages))
    given = [*tensors, grad, means, rstds, pivot, sums, centred, *_given(kept)]
    needs = need_x, tuple(need_weights), need_gammas, need_residual
    found = launch.run(_backward, given, counts, tuple(taps), tuple(geometry), ACTIVATIONS[activation], *needs)
    dbeta, rest = found[0], iter(found[1:])
    dresidual = next(rest) if need_residual else x.new_empty(0)
    dx = next(rest) if need_x else x.new_empty(0)
    dgammas = next(rest) if need_gammas else dbeta.new_empty(0)
    dws = [
        dw if dw.stride() == weight.stride() else torch.empty_like(weight).copy_(dw)
        for dw, weight in zip(rest, (w for w, need in zip(weights, need_weights, strict=True) if need), strict=True)
    ]
    return dx, dws, dgammas, dbeta, dresidual


def _given(t: Tensor | None) -> list[Tensor]:
    return [] if t is None else [t]


def _packed(
    x: Tensor, geometry: list[int], padded: bool, *lists: list[Tensor]
) -> tuple[list[Tensor], tuple[int, ...]]:
    """x, its tables of rectangles and the lists' tensors, dense, one after another; and how long the lists are."""
    own = (_moments_pass if padded else _gradient_pass)(x, [x], tuple(geometry))
    tables = _tables(
        tuple(geometry), x.shape[0], (x.shape[2], x.shape[3]), own.programs, own.tile.block_m, padded, x.device
    )
    return [x, *tables, *(t.contiguous() for given in lists for t in given)], tuple(map(len, lists))


def _rectangles(geometry: tuple[int, ...], x: Tensor, own: _Pass, padded: bool) -> Rectangles:
    make = rectangles.padded if padded else rectangles.inside
    size = (x.shape[2], x.shape[3])
    return make(unpack(list(geometry)), x.shape[0], size, own.programs, own.tile.block_m)


@kept(512)
def _tables(
    geometry: tuple[int, ...],
    images: int,
    size: tuple[int, int],
    programs: int,
    block: int,
    padded: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    make = rectangles.padded if padded else rectangles.inside
    found = make(unpack(list(geometry)), images, size, programs, block)
    table, reads = (torch.tensor(t, dtype=torch.int32) for t in (found.table, found.reads))
    return table.to(device), reads.to(device)


def _shifts(geometry: Sequence[int]) -> int:
    return geometry[1] + (geometry[0] - 1) * (2 * geometry[1] - 1)


@lru_cache(1024)
def _window(geometry: tuple[int, ...]) -> Window:
    return Window.of(unpack(list(geometry)), ()).constant


def _pass(x: Tensor, maps: Sequence[Tensor], geometry: tuple[int, ...], channels: int, numbers: int) -> _Pass:
    """A pass over `maps`, x among them, that computes so many numbers a tile of `channels` channels."""
    far = max(sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in maps)
    tile = configs.depthwise_pass(x.stride(1) == 1, channels, numbers)
    pixels = max(t.shape[0] * t.shape[2] * t.shape[3] for t in maps)
    return _Pass(_window(geometry), tile, max(far, 4 * pixels) >= 2**31, cdiv(channels, tile.block_k))


def _moments_pass(x: Tensor, maps: Sequence[Tensor], geometry: tuple[int, ...]) -> _Pass:
    return _pass(x, maps, geometry, x.shape[1], _shifts(geometry) + 1)


def _gradient_pass(x: Tensor, maps: Sequence[Tensor], geometry: tuple[int, ...]) -> _Pass:
    return _pass(x, maps, geometry, x.shape[1], 1)


def _forward(
    tensors: Sequence[Tensor],
    counts: tuple[int, ...],
    eps: tuple[float, ...],
    taps: tuple[int, ...],
    geometry: tuple[int, ...],
    channels_last: bool | None,
    activation: str,
) -> list[Tensor]:
    """[out, means, variances, rstds, pivot, sums, centred]; channels_last: None leaves out `out`."""
    (x, rects, reads), weights, gammas, betas, residual = _parts(tensors, (3, *counts))
    (N, C, H, W), K, device = x.shape, weights[0].shape[0], x.device
    pivot = launch.empty((C,), torch.float64, device)
    tile = configs.algebra_tile(1)
    sizes = {"ROWS": _PIVOT_ROWS, "COLUMNS": _PIVOT_COLUMNS, "BLOCK_K": tile}
    launch.launch(depthwise_moments.channel_pivots, (cdiv(C, tile),), x, pivot, N, C, H, W, *x.stride(), **sizes)
    numbers = _shifts(geometry) + 1
    own = _moments_pass(x, [x], geometry)
    known = _rectangles(geometry, x, own, True)
    count = len(known.table)
    partial = launch.empty((known.tasks, numbers, C), torch.float64, device)
    wide = N * H * W < FEW_PIXELS or 0.0 in eps
    launch.launch(
        depthwise_moments.autocorrelate,
        (known.tasks * own.blocks,),
        x,
        pivot,
        rects,
        partial,
        count,
        known.share,
        N,
        C,
        H,
        W,
        *x.stride(),
        WIDE=wide,
        MOST_RECTS=power_of_two(count),
        **own.options,
    )
    moments = _merged(partial, rects, count)
    norms, rows, columns = len(eps), *geometry[:2]
    means, variances, rstds = (launch.empty((norms, K), torch.float64, device) for _ in range(3))
    sums = launch.empty((C, rows * columns), torch.float64, device)
    centred = launch.empty((K, numbers_of(norms, list(taps), list(geometry))), torch.float32, device)
    folded = None if channels_last is None else launch.empty((rows * columns + 1, K), torch.float32, device)
    results = [means, variances, rstds, pivot, sums, centred]
    kept = means, variances, rstds, sums, centred, folded
    _prepare(x, geometry, taps, weights, gammas, betas, eps, (moments, reads, pivot), kept, count, True)
    if folded is None or channels_last is None:
        return results
    return [_convolved(x, geometry, K, pivot, folded, channels_last, residual, activation), *results]


def _parts(tensors: Sequence[Tensor], counts: tuple[int, ...]) -> list[list[Tensor]]:
    """launch.split, what is left last."""
    return launch.split(tensors, (*counts, len(tensors) - sum(counts)))


def _merged(partial: Tensor, rects: Tensor | None, count: int) -> Tensor:
    """Rectangles × numbers × channels of the partial results of so many rectangles' tasks; None: of one's."""
    tasks, numbers, channels = partial.shape
    sums = launch.empty((count, numbers, channels), torch.float64, partial.device)
    block = configs.merge_block(numbers)
    launch.launch(
        depthwise_algebra.merge,
        (count, cdiv(channels, block.channels)),
        partial,
        rects,
        sums,
        tasks,
        channels,
        numbers,
        BLOCK_T=block.tasks,
        BLOCK_N=block.numbers,
        BLOCK_C=block.channels,
    )
    return sums


def _prepare(
    x: Tensor,
    geometry: tuple[int, ...],
    taps: tuple[int, ...],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: tuple[float, ...],
    given: tuple[Tensor | None, Tensor | None, Tensor],
    kept: tuple[Tensor | None, ...],
    count: int,
    statistics: bool,
) -> None:
    C, K = x.shape[1], weights[0].shape[0]
    tap_block = power_of_two(geometry[0] * geometry[1])
    block = configs.algebra_tile(tap_block)
    launch.launch(
        depthwise_algebra.prepare,
        (cdiv(K, block),),
        *given,
        tuple(weights),
        tuple(gammas),
        tuple(betas),
        eps,
        *kept,
        count,
        _pixels(x, geometry),
        C,
        K,
        K // C,
        BRANCHES=without_normed(taps),
        NORMED=unpack_normed(taps),
        TOTAL=len(eps) > sum(unpack_normed(taps)),
        STATISTICS=statistics,
        FOLD=kept[-1] is not None,
        ROWS=geometry[0],
        COLUMNS=geometry[1],
        TAPS=tap_block,
        BLOCK=block,
    )


def _pixels(x: Tensor, geometry: tuple[int, ...]) -> int:
    rows, columns = unpack(list(geometry)).output_size(x.shape[2], x.shape[3])
    return x.shape[0] * rows * columns


def _convolved(
    x: Tensor,
    geometry: tuple[int, ...],
    K: int,
    pivot: Tensor,
    folded: Tensor,
    channels_last: bool,
    residual: Sequence[Tensor] = (),
    activation: str = "",
) -> Tensor:
    (N, C, H, W), (OH, OW) = x.shape, unpack(list(geometry)).output_size(x.shape[2], x.shape[3])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = launch.empty((N, K, OH, OW), x.dtype, x.device, layout)
    own = _pass(x, [x, out], geometry, K, 1)
    M = N * OH * OW
    launch.launch(
        depthwise_moments.convolve,
        (cdiv(M, own.tile.block_m) * own.blocks,),
        x,
        pivot,
        folded,
        residual[0] if residual else None,
        out,
        M,
        C,
        K,
        K // C,
        H,
        W,
        OH,
        OW,
        *x.stride(),
        *out.stride(),
        ACTIVATION=activation,
        **own.options,
    )
    return out


def _apply(
    tensors: Sequence[Tensor],
    counts: tuple[int, ...],
    taps: tuple[int, ...],
    geometry: tuple[int, ...],
    channels_last: bool,
) -> list[Tensor]:
    (x, means, rstds, pivot), weights, gammas, betas = launch.split(tensors, (4, *counts))
    folded = _kernels(x, geometry, taps, weights, gammas, betas, means, rstds, pivot)
    return [_convolved(x, geometry, weights[0].shape[0], pivot, folded, channels_last)]


def _kernels(
    x: Tensor,
    geometry: tuple[int, ...],
    taps: tuple[int, ...],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    sums: Tensor | None = None,
) -> Tensor:
    """What convolve takes, by statistics that are known; of nested batch norms by the patches' sums, too."""
    folded = launch.empty((geometry[0] * geometry[1] + 1, weights[0].shape[0]), torch.float32, x.device)
    kept = means, None, rstds, sums, None, folded
    none = (0.0,) * len(means)
    _prepare(x, geometry, taps, weights, gammas, betas, none, (None, None, pivot), kept, 0, False)
    return folded


def _backward(
    tensors: Sequence[Tensor],
    counts: tuple[int, ...],
    taps: tuple[int, ...],
    geometry: tuple[int, ...],
    activation: str,
    need_x: bool,
    need_weights: tuple[bool, ...],
    need_gammas: bool,
    need_residual: bool,
) -> list[Tensor]:
    """[dβ, dresidual, dx, dγs, *dWs], what is not needed left out."""
    (x, rects, reads), weights, gammas, betas, averages, rest, kept = _parts(tensors, (3, *counts, 6))
    grad, means, rstds, pivot, sums, centred = rest
    (N, C, H, W), (_, K, OH, OW), device = x.shape, grad.shape, x.device
    rows, columns = geometry[:2]
    size, norms, M = rows * columns, len(means), N * OH * OW
    own = _pass(x, [x, grad], geometry, K, size + 1)
    share = rectangles.share_of(M, own.programs, own.tile.block_m)
    partial = launch.empty((cdiv(M, share), size + 1, K), torch.float64, device)
    numbers = M, share, C, K, K // C, H, W, OH, OW, *x.stride(), *grad.stride()
    kernels = None
    if activation and not is_clamp(activation):
        kernels = _kernels(x, geometry, taps, weights, gammas, betas, means, rstds, pivot, sums)
    sloped = launch.empty_like(grad) if activation and (need_x or need_residual) else None
    launch.launch(
        depthwise_moments.correlate,
        (len(partial) * own.blocks,),
        x,
        pivot,
        grad,
        kept[0] if kept else None,
        kernels,
        sloped,
        partial,
        *numbers,
        ACTIVATION=activation,
        **own.options,
    )
    grad = grad if sloped is None else sloped
    products = _merged(partial, None, 1)
    dbeta = launch.empty((K,), torch.float32, device)
    dgammas = launch.empty((norms, K), torch.float32, device) if need_gammas else None
    dws = [launch.empty_like(weight) if need else None for weight, need in zip(weights, need_weights, strict=True)]
    folded = launch.empty((size, K), torch.float32, device) if need_x else None
    squares = launch.empty((size * size + size, C), torch.float64, device) if need_x else None
    tap_block = power_of_two(size)
    block = configs.algebra_tile(tap_block)
    launch.launch(
        depthwise_algebra.differentiate,
        (cdiv(C, block),),
        products,
        pivot,
        tuple(weights),
        tuple(gammas),
        means,
        rstds,
        sums,
        centred,
        averages[0] if averages else None,
        tuple(dws),
        dgammas,
        dbeta,
        folded,
        squares,
        M,
        C,
        K,
        K // C,
        BRANCHES=without_normed(taps),
        NORMED=unpack_normed(taps),
        TOTAL=norms > sum(unpack_normed(taps)),
        INPUT=need_x,
        ROWS=rows,
        COLUMNS=columns,
        TAPS=tap_block,
        BLOCK=block,
    )
    found = [dbeta, *([grad] if need_residual else [])]
    if folded is not None and squares is not None:
        found.append(_input_gradient(x, grad, rects, reads, pivot, folded, squares, geometry))
    return [*found, *(t for t in (dgammas, *dws) if t is not None)]


def _input_gradient(
    x: Tensor,
    grad: Tensor,
    rects: Tensor,
    reads: Tensor,
    pivot: Tensor,
    folded: Tensor,
    squares: Tensor,
    geometry: tuple[int, ...],
) -> Tensor:
    (N, C, H, W), (_, K, OH, OW) = x.shape, grad.shape
    dx = launch.empty_like(x)
    own = _gradient_pass(x, [x, grad, dx], geometry)
    known = _rectangles(geometry, x, own, False)
    count, (rows, columns) = len(known.table), geometry[:2]
    shifts = (2 * rows - 1) * (2 * columns - 1)
    corrections = launch.empty((count, shifts + 1, C), torch.float32, x.device)
    shift_block = power_of_two(shifts)
    block = configs.correction_tile(shift_block)
    launch.launch(
        depthwise_algebra.correct,
        (count, cdiv(C, block)),
        squares,
        reads,
        corrections,
        C,
        ROWS=rows,
        COLUMNS=columns,
        SHIFTS=shift_block,
        BLOCK=block,
    )
    launch.launch(
        depthwise_moments.input_gradient,
        (known.tasks * own.blocks,),
        x,
        pivot,
        grad,
        rects,
        folded,
        corrections,
        dx,
        count,
        known.share,
        N,
        C,
        K,
        K // C,
        H,
        W,
        OH,
        OW,
        *x.stride(),
        *grad.stride(),
        *dx.stride(),
        MOST_RECTS=power_of_two(count),
        **own.options,
    )
    return dx
