"""The three branches' convolutions on CUDA by Triton: launches of kernels/*.py, no maths.

Maps are channels_last; weights K×C/groups×rows×columns, all in one memory format, in the input's dtype (fp32, fp16,
bf16). `weights`, `ys` and their gradients are (square, hor, ver), None for an absent branch.
fp32 is computed in TF32 where torch.backends.cudnn.conv.fp32_precision says "tf32", else by three TF32 products;
with one input channel a group, where there are no matrix products, always in fp32.
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
from ..kernels.wgrad import conv_wgrad, sum_splits
from ..kernels.window import Window
from .check import addressable, kernel_size
from .triton_bn_sum import Moments, Norms, apply, check_maps, merge_statistics

INTERPRETED = triton.knobs.runtime.interpret
_SUM_BLOCK = 1024
_KERNELS = {"conv": conv_branches, "dgrad": conv_dgrad, "wgrad": conv_wgrad}
_DEPTHWISE = {"conv": depthwise_branches, "dgrad": depthwise_dgrad, "wgrad": depthwise_wgrad}

Weights = Sequence[Tensor | None]


class _Plan(NamedTuple):
    """What a launch is made of beyond its tensors; one a problem, cached."""

    kernel: Any
    depthwise: bool
    size: tuple[int, int]  # OH, OW
    rows: int  # N·OH·OW
    scalars: tuple[int, ...]  # those of C, K, CG, KG, H, W, OH, OW that the kernel takes
    options: dict[str, Any]
    config: Config


def checked_size(window: Window, shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the output of an N×C×H×W input; ValueError where there is none."""
    k = window.kernel
    kernel_size(k)
    addressable(window=window)
    sizes = (window.stride_h, window.stride_w, window.dil_h, window.dil_w, window.groups)
    lines = (window.hor_row, window.ver_col)
    if min(sizes) < 1 or min(window.pad_h, window.pad_w, *lines) < 0 or max(lines) >= k:
        raise ValueError(f"window must have sizes above 0, padding from 0 on and lines in the kernel, got {window}")
    size = window.output_size(shape[2], shape[3])
    if min(*shape[1:], *size) < 1:
        raise ValueError(f"an input of shape {tuple(shape)} has no output by {window}")
    return size


@lru_cache(maxsize=4096)
def _plan(
    kind: str,
    shape: tuple[int, ...],
    K: int,
    window: Window,
    last: bool,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    config: Config | None,
) -> _Plan:
    N, C, H, W = shape
    size = checked_size(window, shape)
    rows = N * size[0] * size[1]
    wide = max(N * C * H * W, rows * K) >= 2**31
    depthwise = window.groups == C
    kernel = (_DEPTHWISE if depthwise else _KERNELS)[kind]
    if config is None and depthwise:
        config = configs.depthwise(kind, C if kind == "dgrad" else K, window.kernel)
    elif config is None:
        family = 90 if INTERPRETED else configs.family(torch.cuda.get_device_capability(device))
        mode = "half" if dtype != torch.float32 else precision
        config = configs.choose(
            kind, family, mode, wide, rows, K // window.groups, C // window.groups, window.groups
        )
    options = {
        "WINDOW": window.constant,
        "CHANNELS_LAST": last,
        "WIDE": wide,
        "PRECISION": precision,
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_C": config.block_c,
        "BLOCK_T": configs.power_of_two(window.kernel),
    }
    taken = {name: value for name, value in options.items() if name in kernel.arg_names}
    taken |= config.options
    scalars = {"C": C, "K": K, "CG": C // window.groups, "KG": K // window.groups, "H": H, "W": W}
    scalars |= {"OH": size[0], "OW": size[1]}
    numbers = tuple(value for name, value in scalars.items() if name in kernel.arg_names)
    return _Plan(kernel, depthwise, size, rows, numbers, taken, config)


def _plan_of(
    kind: str, like: Tensor, shape: tuple[int, ...], weights: Weights, window: Window, config: Config | None
) -> _Plan:
    """Checks the weights against an input of `shape` and `like`'s dtype and device, and looks the launch up."""
    if len(weights) != 3 or weights[0] is None:
        raise ValueError("weights must be (square, hor or None, ver or None)")
    k, (K, CG), dtype = window.kernel, weights[0].shape[:2], like.dtype
    if CG * window.groups != shape[1] or K % window.groups:
        raise ValueError(
            f"weights[0] of shape {tuple(weights[0].shape)} must fit {shape[1]} channels in {window.groups} groups"
        )
    for i, (w, lines) in enumerate(zip(weights, ((k, k), (1, k), (k, 1)), strict=True)):
        if w is not None and (w.shape != (K, CG, *lines) or w.dtype != dtype or w.device != like.device):
            raise ValueError(
                f"weights[{i}] must be {dtype} of shape {(K, CG, *lines)} on {like.device}, "
                f"got {w.dtype} of {tuple(w.shape)} on {w.device}"
            )
    last = all(w is None or w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    if not last and not all(w is None or w.is_contiguous() for w in weights):
        raise ValueError("weights must all be contiguous or all be channels_last")
    exact = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]
    return _plan(kind, tuple(shape), K, window, last, dtype, "tf32x3" if exact else "tf32", like.device, config)


def _empty_map(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def conv_forward(
    x: Tensor, weights: Weights, window: Window, *, store: bool = True, config: Config | None = None
) -> tuple[tuple[Tensor | None, ...], Moments]:
    """(y_b, their per-tile statistics), y_b = W_b * x: one launch.

    Args:
        x: N×C×H×W.
        store: False computes the statistics alone, and every y_b is None.
        config: in place of the table's choice.
    """
    check_maps(x=x)
    plan = _plan_of("conv", x, x.shape, weights, window, config)
    M, K, (block_m, block_k, *_) = plan.rows, plan.scalars[1], plan.config
    ys = tuple(_empty_map((x.shape[0], K, *plan.size), x) if store and w is not None else None for w in weights)
    present = sum(w is not None for w in weights)
    if plan.depthwise:
        tiles, rows = configs.row_split(M, K, Tile(block_m, block_k))
        split: tuple[int, ...] = (M, rows, tiles)
        grid: tuple[int, ...] = (tiles, cdiv(K, block_k))
    else:
        tiles, rows = cdiv(M, block_m), block_m
        split = (M, tiles)
        grid = (tiles * window.groups * cdiv(K // window.groups, block_k),)
    partial = torch.empty((present, 2, K, tiles), dtype=torch.float32, device=x.device)
    plan.kernel[grid](x, tuple(weights), ys, partial, *split, *plan.scalars, STORE=store, **plan.options)
    return ys, Moments(partial, rows, M)


def block_forward(
    x: Tensor,
    weights: Weights,
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    window: Window,
) -> tuple[Tensor, list[Tensor], Norms]:
    """(out, present y_b, statistics) of Σ_b BN_b(W_b * x) by the batch's statistics: three launches.

    gammas, betas, eps: one entry a present branch; gammas, betas may be empty for γ = 1, β = 0.
    """
    ys, moments = conv_forward(x, weights, window)
    present = [y for y in ys if y is not None]
    norms = merge_statistics(moments, gammas, betas, eps)
    return apply(present, norms), present, norms


def input_grad(
    dys: Sequence[Tensor | None],
    weights: Weights,
    window: Window,
    input_size: tuple[int, int],
    *,
    config: Config | None = None,
) -> Tensor:
    """dx (N×C×input_size) from dy_b, in their dtype: one launch."""
    dy = _check_grads(dys, weights)
    square = weights[0]
    assert square is not None
    shape = (dy.shape[0], square.shape[1] * window.groups, *input_size)
    plan = _plan_of("dgrad", dy, shape, weights, window, config)
    _check_size(dy, plan.scalars[1], plan.size)
    dx = _empty_map(shape, dy)
    if plan.depthwise:
        M = shape[0] * input_size[0] * input_size[1]
        split: tuple[int, ...] = (M,)
        grid: tuple[int, ...] = (cdiv(M, plan.config.block_m), cdiv(shape[1], plan.config.block_k))
    else:
        largest_phase = cdiv(input_size[0], window.stride_h) * cdiv(input_size[1], window.stride_w)
        tiles = cdiv(shape[0] * largest_phase, plan.config.block_m)
        blocks = window.groups * cdiv(square.shape[1], plan.config.block_c)
        split = (shape[0], tiles)
        grid = (window.stride_h * window.stride_w * tiles * blocks,)
    plan.kernel[grid](tuple(dys), tuple(weights), dx, *split, *plan.scalars, **plan.options)
    return dx


def weight_grads(
    x: Tensor, dys: Sequence[Tensor | None], weights: Weights, window: Window, *, config: Config | None = None
) -> tuple[Tensor | None, ...]:
    """dW_b from x and dy_b, in the weights' dtype and memory format: two launches, or one where nothing is split.

    `weights` tell shape, dtype and format alone.
    """
    dy = _check_grads(dys, weights)
    check_maps(x=x)
    plan = _plan_of("wgrad", x, x.shape, weights, window, config)
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise ValueError(f"dys must be {x.dtype} for {x.shape[0]} images, got {dy.dtype} for {dy.shape[0]}")
    _check_size(dy, plan.scalars[1], plan.size)
    dws = tuple(None if w is None else torch.empty_like(w, memory_format=torch.preserve_format) for w in weights)
    K = dy.shape[1]
    if plan.depthwise:  # a program takes a row of taps
        taps, blocks = window.kernel, cdiv(K, plan.config.block_k)
    else:
        KG, CG = K // window.groups, x.shape[1] // window.groups
        taps = window.kernel**2
        blocks = window.groups * cdiv(KG, plan.config.block_k) * cdiv(CG, plan.config.block_c)
    splits, rows = configs.pixel_split(plan.rows, blocks * taps, plan.config.block_m)
    sizes = tuple(0 if w is None else w.numel() for w in weights)
    targets, stride = dws, sum(sizes)
    if splits > 1:
        partial = torch.empty(splits * stride, dtype=torch.float32, device=x.device)
        starts = (0, sizes[0], sizes[0] + sizes[1])
        targets = tuple(None if w is None else partial[at:] for w, at in zip(weights, starts, strict=True))
    grid = (blocks, taps, splits)
    plan.kernel[grid](x, tuple(dys), targets, plan.rows, rows, stride, *plan.scalars, **plan.options)
    if splits > 1:
        grid = (cdiv(sizes[0], _SUM_BLOCK), 3, 1)
        sum_splits[grid](targets, dws, sizes, splits, stride, BLOCK=_SUM_BLOCK)
    return dws


def _check_grads(dys: Sequence[Tensor | None], weights: Weights) -> Tensor:
    """The square branch's dy; ValueError where dys and weights do not name the same branches, or dys differ."""
    if [dy is None for dy in dys] != [w is None for w in weights] or dys[0] is None:
        raise ValueError("dys must hold a tensor for each of the weights, and None where a weight is None")
    check_maps(**{f"dys[{i}]": dy for i, dy in enumerate(dys) if dy is not None})
    return dys[0]


def _check_size(dy: Tensor, channels: int, size: tuple[int, int]) -> None:
    if tuple(dy.shape[1:]) != (channels, *size):
        raise ValueError(
            f"dys must be {size[0]}×{size[1]} for this input, of {channels} channels, got {tuple(dy.shape[1:])}"
        )
