"""Up to three branches' convolutions on CUDA by Triton: launches of kernels/*.py, no maths.

Maps are channels_last; weights K×C/groups×rows×columns, all in one memory format, in the input's dtype (fp32, fp16,
bf16). `weights`, `ys` and their gradients have one entry for each of the window's branches, in its order.
fp32 is computed in TF32 where torch.backends.cudnn.conv.fp32_precision says "tf32", with weights rounded to it, and
ordered as the products read them, by a launch more, maps and their gradients cut; else by three TF32 products; with
one input channel a group, where there are no matrix products, always in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..kernels import configs
from ..kernels.configs import Config, Tile, cdiv
from ..kernels.conv import conv_branches
from ..kernels.depthwise import depthwise_branches, depthwise_dgrad, depthwise_wgrad
from ..kernels.dgrad import conv_dgrad
from ..kernels.rounding import round_to_tf32
from ..kernels.taps import end_row, first_row, taps_before
from ..kernels.wgrad import conv_wgrad, sum_splits
from ..kernels.window import MOST_BRANCHES, Window
from .check import MOST_TAPS, addressable
from .launch import empty, empty_like, launch, tail
from .running import NONE, Running
from .triton_bn_sum import Moments, Norms, apply, check_maps, merge_statistics

INTERPRETED = triton.knobs.runtime.interpret
_KERNELS = {"conv": conv_branches, "dgrad": conv_dgrad, "wgrad": conv_wgrad}
_DEPTHWISE = {"conv": depthwise_branches, "dgrad": depthwise_dgrad, "wgrad": depthwise_wgrad}


class _Prepared(NamedTuple):
    """What a launch is made of beyond its tensors; one a problem, cached."""

    kernel: Any
    depthwise: bool
    mode: str  # one of configs.MODES
    rounding: dict[str, Any] | None  # round_to_tf32's options, where the kernel takes weights rounded
    size: tuple[int, int]  # OH, OW
    rows: int  # N·OH·OW
    scalars: tuple[int, ...]  # those of C, K, CG, KG, H, W, OH, OW that the kernel takes
    options: dict[str, Any]
    config: Config
    taps: int  # programs that share a block of the weights: one a branch's tap; a row of the window where depthwise


def checked_size(window: Window, shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the output of an N×C×H×W input; ValueError where there is none."""
    numbers = window[:-1]
    addressable(window=(*numbers, *(max(taps) for taps in window.branches)))
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, *sizes = numbers
    if min(stride_h, stride_w, *sizes) < 1 or min(pad_h, pad_w) < 0:
        raise ValueError(f"window must have sizes above 0 and padding from 0 on, got {window}")
    if not 0 < min(kernel_h, kernel_w) <= max(kernel_h, kernel_w) <= MOST_TAPS:
        raise ValueError(f"window must have a kernel of 1 to {MOST_TAPS} rows and columns, got {window}")
    if not 1 <= len(window.branches) <= MOST_BRANCHES:
        raise ValueError(f"window must have 1 to {MOST_BRANCHES} branches, got {window}")
    for row, column, rows, columns, step in window.branches:
        below, right = row + (rows - 1) * step, column + (columns - 1) * step
        if min(row, column) < 0 or min(rows, columns, step) < 1 or below >= kernel_h or right >= kernel_w:
            raise ValueError(f"window must have branches of taps in its kernel, got {window}")
    size = window.output_size(shape[2], shape[3])
    if min(*shape[1:], *size) < 1:
        raise ValueError(f"an input of shape {tuple(shape)} has no output by {window}")
    return size


@lru_cache(maxsize=64)
def device_family(device: torch.device) -> tuple[int, int]:
    """(the configurations' column for a device, its multiprocessors); under the interpreter an H100's."""
    if INTERPRETED:
        return 90, 132
    told = torch.cuda.get_device_properties(device)
    return configs.family((told.major, told.minor)), told.multi_processor_count


@lru_cache(maxsize=4096)
def _prepare(
    kind: str,
    shape: tuple[int, ...],
    K: int,
    window: Window,
    last: bool,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    config: Config | None,
) -> _Prepared:
    N, C, H, W = shape
    size = checked_size(window, shape)
    rows, KG, CG = N * size[0] * size[1], K // window.groups, C // window.groups
    mode = "half" if dtype != torch.float32 else precision
    int64_offsets = max(N * C * H * W, rows * K) >= 2**31
    depthwise = window.groups == C
    kernel = (_DEPTHWISE if depthwise else _KERNELS)[kind]
    if config is None and depthwise:
        config = configs.depthwise(kind, C if kind == "dgrad" else K, max(taps.columns for taps in window.branches))
    elif config is None:
        family, processors = device_family(device)
        config = configs.choose(kind, family, mode, int64_offsets, rows, KG, CG, window.groups, processors)
    rounds = kind != "wgrad" and dtype == torch.float32 and precision == "tf32" and not depthwise
    by_k = rounds and kind == "dgrad"
    weights = {"WINDOW": window.constant, "CHANNELS_LAST": last}
    options = {
        **weights,
        "CHANNELS_LAST": last or rounds,
        "REDUCE_K": by_k,
        "VECTOR_C": configs.told(mode, CG),
        "VECTOR_K": configs.told(mode, KG),
        "INT64_OFFSETS": int64_offsets,
        "PRECISION": precision,
        "INTERPRETER_FP32": INTERPRETED and dtype == torch.bfloat16,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_C": config.block_c,
    }
    taken = {name: value for name, value in options.items() if name in kernel.arg_names}
    taken |= config.options
    scalars = {"C": C, "K": K, "CG": CG, "KG": KG, "H": H, "W": W}
    scalars |= {"OH": size[0], "OW": size[1]}
    numbers = tuple(value for name, value in scalars.items() if name in kernel.arg_names)
    taps = end_row(window) - first_row(window) if depthwise else taps_before(window)
    rounding = {**weights, "REDUCE_K": by_k, "BLOCK": configs.ROUND_BLOCK} if rounds else None
    return _Prepared(kernel, depthwise, mode, rounding, size, rows, numbers, taken, config, taps)


def _prepared(
    kind: str,
    like: Tensor,
    shape: tuple[int, ...],
    weights: Sequence[Tensor],
    window: Window,
    config: Config | None,
) -> _Prepared:
    """Checks the weights against an input of `shape` and `like`'s dtype and device, and looks the launch up."""
    if len(weights) != len(window.branches) or not weights:
        raise ValueError(f"weights must hold a tensor for each branch of {window}, got {len(weights)}")
    (K, CG), dtype = weights[0].shape[:2], like.dtype
    if CG * window.groups != shape[1] or K % window.groups:
        raise ValueError(
            f"weights[0] of shape {tuple(weights[0].shape)} must fit {shape[1]} channels in {window.groups} groups"
        )
    for i, (w, taps) in enumerate(zip(weights, window.branches, strict=True)):
        if w.shape != (K, CG, taps.rows, taps.columns) or w.dtype != dtype or w.device != like.device:
            raise ValueError(
                f"weights[{i}] must be {dtype} of shape {(K, CG, taps.rows, taps.columns)} on {like.device}, "
                f"got {w.dtype} of {tuple(w.shape)} on {w.device}"
            )
    last = all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    if not last and not all(w.is_contiguous() for w in weights):
        raise ValueError("weights must all be contiguous or all be channels_last")
    return _prepare(kind, tuple(shape), K, window, last, dtype, precision_of(dtype), like.device, config)


def precision_of(dtype: torch.dtype) -> str:
    """How maps of this dtype are multiplied now: in "tf32", or in "tf32x3" where PyTorch is not to use TF32."""
    exact = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]
    return "tf32x3" if exact else "tf32"


def _empty_map(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return empty(shape, like.dtype, like.device, torch.channels_last)


def _as_multiplied(weights: Sequence[Tensor], window: Window, prepared: _Prepared) -> tuple[Tensor, ...]:
    """The weights as the products take them."""
    if prepared.rounding is None:
        return tuple(weights)
    rounded = tuple(empty((w.numel(),), w.dtype, w.device) for w in weights)
    CG, KG = weights[0].shape[1], weights[0].shape[0] // window.groups
    blocks = window.groups * cdiv(KG, configs.ROUND_BLOCK) * cdiv(CG, configs.ROUND_BLOCK)
    grid = (blocks, max(taps.rows * taps.columns for taps in window.branches), len(weights))
    launch(round_to_tf32, grid, tuple(weights), rounded, CG, KG, **prepared.rounding)
    return rounded


def conv_forward(
    x: Tensor, weights: Sequence[Tensor], window: Window, *, store: bool = True, config: Config | None = None
) -> tuple[list[Tensor], Moments]:
    """(y_b, their per-tile statistics), y_b = W_b * x: one launch.

    Args:
        x: N×C×H×W.
        store: False computes the statistics alone, and there are no y_b.
        config: in place of the table's choice.
    """
    check_maps(x=x)
    prepared = _prepared("conv", x, x.shape, weights, window, config)
    M, K, (block_m, block_k, *_) = prepared.rows, prepared.scalars[1], prepared.config
    ys = [_empty_map((x.shape[0], K, *prepared.size), x) for _ in weights] if store else []
    if prepared.depthwise:
        tiles, rows = configs.row_split(M, K, Tile(block_m, block_k))
        split: tuple[int, ...] = (M, rows, tiles)
        grid: tuple[int, ...] = (tiles, cdiv(K, block_k))
    else:
        tiles, rows = cdiv(M, block_m), block_m
        split = (M, tiles)
        grid = (tiles * window.groups * cdiv(K // window.groups, block_k),)
    partial = empty((len(weights), 2, K, tiles), torch.float32, x.device)
    targets = tuple(ys) or (None,) * len(weights)
    sizes = (*split, *prepared.scalars)
    weights = _as_multiplied(weights, window, prepared)
    launch(prepared.kernel, grid, x, weights, targets, partial, *sizes, STORE=store, **prepared.options)
    return ys, Moments(partial, rows, M)


def block_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    window: Window,
    running: Running = NONE,
    residual: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, list[Tensor], Norms]:
    """(out, y_b, statistics) of act(Σ_b BN_b(W_b * x) + residual) by the batch's statistics: three launches.

    gammas, betas, eps: one entry a branch; gammas, betas may be empty for γ = 1, β = 0. Running statistics and
    their counters are moved.
    """
    ys, moments = conv_forward(x, weights, window)
    norms = merge_statistics(moments, gammas, betas, eps, running)
    return apply(ys, norms, None, running, residual, activation), ys, norms


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    window: Window,
    input_size: tuple[int, int],
    *,
    config: Config | None = None,
) -> Tensor:
    """dx (N×C×input_size) from dy_b, in their dtype: one launch."""
    dy = _check_grads(dys, weights)
    CG = weights[0].shape[1]
    shape = (dy.shape[0], CG * window.groups, *input_size)
    prepared = _prepared("dgrad", dy, shape, weights, window, config)
    _check_size(dy, prepared.scalars[1], prepared.size)
    dx = _empty_map(shape, dy)
    if prepared.depthwise:
        M = shape[0] * input_size[0] * input_size[1]
        split: tuple[int, ...] = (M,)
        grid: tuple[int, ...] = (cdiv(M, prepared.config.block_m), cdiv(shape[1], prepared.config.block_k))
    else:
        largest_phase = cdiv(input_size[0], window.stride_h) * cdiv(input_size[1], window.stride_w)
        tiles = cdiv(shape[0] * largest_phase, prepared.config.block_m)
        blocks = window.groups * cdiv(CG, prepared.config.block_c)
        split = (shape[0], tiles)
        grid = (window.stride_h * window.stride_w * tiles * blocks,)
    sizes = (*split, *prepared.scalars)
    multiplied = _as_multiplied(weights, window, prepared)
    launch(prepared.kernel, grid, tuple(dys), multiplied, dx, *sizes, **prepared.options)
    return dx


def weight_grads(
    x: Tensor, dys: Sequence[Tensor], weights: Sequence[Tensor], window: Window, *, config: Config | None = None
) -> list[Tensor]:
    """dW_b from x and dy_b, in the weights' dtype and memory format: two launches, or one where nothing is split.

    `weights` tell shape, dtype and format alone.
    """
    dy = _check_grads(dys, weights)
    check_maps(x=x)
    prepared = _prepared("wgrad", x, x.shape, weights, window, config)
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise ValueError(f"dys must be {x.dtype} for {x.shape[0]} images, got {dy.dtype} for {dy.shape[0]}")
    _check_size(dy, prepared.scalars[1], prepared.size)
    dws = [empty_like(w) for w in weights]
    K = dy.shape[1]
    config = prepared.config
    if prepared.depthwise:
        blocks = cdiv(K, config.block_k)
        splits, rows = configs.pixel_split(prepared.rows, blocks * prepared.taps, config.block_m)
    else:
        KG, CG = K // window.groups, x.shape[1] // window.groups
        blocks = window.groups * cdiv(KG, config.block_k) * cdiv(CG, config.block_c)
        slots = device_family(x.device)[1] * configs.WARPS[prepared.mode] // config.warps
        splits, rows = configs.pixel_split(prepared.rows, blocks * prepared.taps, config.block_m, slots)
    sizes = tuple(w.numel() for w in weights)
    targets, stride = tuple(dws), sum(sizes)
    if splits > 1:
        partial = empty((splits * stride,), torch.float32, x.device)
        targets = tuple(tail(partial, sum(sizes[:b])) for b in range(len(sizes)))
    grid = (blocks, prepared.taps, splits)
    split = (prepared.rows, rows, stride)
    launch(prepared.kernel, grid, x, tuple(dys), targets, *split, *prepared.scalars, **prepared.options)
    if splits > 1:
        grid = (cdiv(max(sizes), configs.SPLIT_BLOCK), len(sizes), 1)
        launch(sum_splits, grid, targets, tuple(dws), sizes, splits, stride, **configs.SPLIT_BLOCKS)
    return dws


def _check_grads(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The first dy; ValueError where dys are not one a weight, or differ."""
    if len(dys) != len(weights) or not weights:
        raise ValueError(f"dys must hold a tensor for each of the weights, got {len(dys)} for {len(weights)}")
    check_maps(**{f"dys[{i}]": dy for i, dy in enumerate(dys)})
    return dys[0]


def _check_size(dy: Tensor, channels: int, size: tuple[int, int]) -> None:
    if tuple(dy.shape[1:]) != (channels, *size):
        raise ValueError(
            f"dys must be {size[0]}×{size[1]} for this input, of {channels} channels, got {tuple(dy.shape[1:])}"
        )
