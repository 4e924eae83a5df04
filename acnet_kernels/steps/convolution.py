"""What backends share about convolutions: their dtype, kernels summed, maps added to, faster gradients."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_compat import mkldnn_accumulates, mkldnn_add_convolution, mkldnn_enabled, mkldnn_has_float16
from ..geometry import Geometry, Pair, Placement, Taps, slices_of
from ..ops._extension import NODE
from ..spec import BRANCH, Problem
from .cpuinfo import slow_half_types

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The least map (elements) whose passes cost more than turning a kernel round, and how many kernels it must be.
LEAST_MAP, LEAST_MAPS_OF_KERNEL = 2**20, 4
# Channels a group below which oneDNN's float32 convolutions take up to 3 times as long as its input gradients.
LEAST_OF_GROUP = 16
# Our own convolutions: taps of a kernel's side, least channels, and channels of x times those of the output beyond
# which the library's are as fast; of float32 in channels_last, which is the library's own order, a half. And how
# often such a matrix goes into the pixels' square at least, as kernels are packed in every step.
MOST_DIRECT_TAPS, LEAST_DIRECT, MOST_DIRECT, LEAST_PIXELS_SQUARED = 15, 4, 128 * 128, 64
MOST_DIRECT_PADDING = 1024  # and dilation
DIRECT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where a tap's matrix product pays: pixels of an image, and elements of the result.
LEAST_PIXELS, LEAST_PRODUCT = 128, 2048
_SLOW_HALF_TYPES = slow_half_types()
_LANES = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)  # of float32 in a register


def convolution_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What the library's convolutions of a step of this dtype compute in: one cast in, one out."""
    return torch.float32 if device == "cpu" and dtype in _SLOW_HALF_TYPES else dtype


def gradient_bytes(problem: Problem, dtype: torch.dtype) -> int:
    """Bytes that the gradients of all branches' convolutions take at most, computed in this dtype.

    dx, and each dW twice, the second time in the library's order. A dx of several branches that cannot be summed
    within their convolutions has the next one's beside it, and a map that the library reorders.
    """
    x, _ = problem.map_bytes(dtype)
    in_one_pass = (
        problem.device == "cpu"
        and problem.channels_last
        and adding_pays(x // dtype.itemsize, problem.shape[1], dtype, problem.geometry)
        and _library_accumulates()
    )
    convolutions = len(problem.batch_stats)  # a sum of the branches is differentiated as one
    return (1 if convolutions == 1 or in_one_pass else 3) * x + 2 * problem.weights * dtype.itemsize


def merge_kernels(weights: Sequence[Tensor], taps: Sequence[Taps], geometry: Geometry) -> Tensor:
    """The kernel (K×C/groups×rows×columns) whose convolution is the sum of the branches'; differentiable."""
    if taps[0] == geometry.whole:
        total = weights[0].clone()
    else:
        total = weights[0].new_zeros(*weights[0].shape[:2], *geometry.kernel)
        tap_view(total, taps[0]).add_(weights[0])
    for weight, own in zip(weights[1:], taps[1:], strict=True):
        tap_view(total, own).add_(weight)
    return total


def tap_view(kernel: Tensor, taps: Taps) -> Tensor:
    """The view of a whole kernel that these taps are."""
    rows, columns = slices_of(taps)
    return kernel[:, :, rows, columns]


def identity_kernel(like: Tensor, groups: int) -> Tensor:
    """The 1×1 kernel, K×C/groups as like's, whose convolution returns the input."""
    eye = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return eye.repeat(groups, 1)[:, :, None, None]


@functools.cache
def _library_accumulates() -> bool:
    # Elsewhere than on x86-64 it may be a slow loop.
    return mkldnn_accumulates() and platform.machine() in ("x86_64", "AMD64")


def accumulates() -> bool:
    """Whether the library's convolutions can add to what is there now: built so, and not switched off."""
    return _library_accumulates() and mkldnn_enabled()


def adding_pays(elements: int, channels: int, dtype: torch.dtype, geometry: Geometry) -> bool:
    """Whether an input gradient of this size is cheaper as a convolution that adds to what is there.

    Args:
        elements, channels: of x; dtype: of the convolution.
    """
    few = geometry.groups > 1 and channels // geometry.groups < LEAST_OF_GROUP and dtype == torch.float32
    return elements >= LEAST_MAP and geometry.stride == (1, 1) and not few


def direct_pays(channels: Pair, pixels: int, dtype: torch.dtype, geometry: Geometry, channels_last: bool) -> bool:
    """Whether csrc/direct.h's convolutions are faster than the library's, and take the step.

    Args:
        channels: of x and of the output; pixels: of all images of x; dtype: of the step's maps.
    """
    near = max(*geometry.padding, *geometry.dilation) <= MOST_DIRECT_PADDING
    fits = geometry.stride == (1, 1) and geometry.groups == 1 and max(geometry.kernel) <= MOST_DIRECT_TAPS
    if not (fits and near) or dtype not in DIRECT_TYPES or _LANES < 16:
        return False
    if dtype != torch.float32 and convolution_dtype(dtype, "cpu") == dtype:
        return False  # the library has instructions for it
    matrix = channels[0] * channels[1]
    if min(channels) < LEAST_DIRECT or pixels**2 < LEAST_PIXELS_SQUARED * matrix:
        return False
    return matrix <= (MOST_DIRECT // 2 if channels_last and dtype == torch.float32 else MOST_DIRECT)


def computed_directly(problem: Problem) -> bool:
    """Whether a step of this problem is computed by our own convolutions, as far as a problem says.

    Conv biases, and batch norms without or with cumulative running statistics, are left to the library's.
    """
    channels = problem.shape[1], problem.out_channels
    pixels = problem.shape[0] * problem.shape[2] * problem.shape[3]
    is_ours = problem.device == "cpu" and problem.norm == BRANCH and NODE is not None
    return is_ours and direct_pays(channels, pixels, problem.dtype, problem.geometry, problem.channels_last)


def direct_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes that our own convolutions take at most, forward and for their gradients, besides the y_b.

    Kernels packed in blocks of 16 channels; for the gradients dx, dW, and sums of products in several parts.
    """
    padded = [-(-channels // 16) * 16 for channels in (problem.shape[1], problem.out_channels)]
    packed = problem.weights * padded[0] * padded[1] // (problem.shape[1] * problem.out_channels)
    rows, columns = problem.output_size
    most = min(max(8, (1 << 20) // packed), 64)
    parts = max(1, min(problem.shape[0] * rows * columns // 512, most))
    return 4 * packed, problem.input_bytes + problem.weights * problem.dtype.itemsize + 4 * packed * (1 + parts)


def _in_one_pass(out: Tensor) -> bool:
    dense = out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
    fits = out.is_cpu and out.dtype in _DTYPES and out.numel() > 0 and dense
    usable = fits and accumulates()
    return usable and (out.dtype != torch.float16 or mkldnn_has_float16())


def add_convolution(out: Tensor, x: Tensor, weight: Tensor, padding: Pair, dilation: Pair, groups: int) -> None:
    """out += conv2d(x, weight) at stride 1, within the library's convolution where it can, so without its own pass.

    Args:
        out: N×K×H'×W', dense; x: N×C×H×W; weight: K×(C/groups)×rows×columns; all of one dtype.
    """
    if not _in_one_pass(out):
        out += F.conv2d(x, weight, None, 1, padding, dilation, groups)
        return
    mkldnn_add_convolution(out, x, weight, padding, dilation, groups)


def transposed_kernel(weight: Tensor, groups: int) -> Tensor:
    """The kernel of the transposed convolution at stride 1: K×C/groups×rows×columns → C×K/groups×rows×columns."""
    return weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor, place: Placement, geometry: Geometry) -> bool:
    """Adds the gradient of x in y = conv2d(place.apply(x), weight) to dx, in one pass.

    At stride 1 that gradient is a convolution of dy with the kernel turned round, and what a placement crops is
    padding of dy. It saves writing the gradient and the passes that would add it.

    Args:
        dx: N×C×H×W, dense; added to in place.
        dy: N×K×H'×W' of dx's dtype; weight: K×(C/groups)×rows×columns of that dtype too.

    Returns:
        Whether it did; dx is untouched where the library has no such convolution for the case.
    """
    left, right, top, bottom = place.edges
    pays = (
        adding_pays(dx.numel(), dx.shape[1], dx.dtype, geometry)
        and dx.numel() >= LEAST_MAPS_OF_KERNEL * weight.numel()
    )
    if not (top == bottom and left == right and pays and _in_one_pass(dx)):
        return False
    reach = [d * (k - 1) for k, d in zip(place.kernel, place.dilation, strict=True)]
    padding = (reach[0] - place.padding[0] - top, reach[1] - place.padding[1] - left)
    if min(padding) < 0:
        return False
    groups = geometry.groups
    add_convolution(dx, dy, transposed_kernel(weight, groups), padding, place.dilation, groups)
    return True


def column_weight_gradient(dy: Tensor, x: Tensor, place: Placement, stride: Pair, groups: int) -> Tensor | None:
    """The gradient of a k×1 kernel in y = conv2d(x, kernel) where matrix products beat the library's, else None.

    A tap is a matrix product an image of dy's pixels with those of x some rows away, which channels_last has as
    they are; oneDNN's weight gradient takes up to 1.5 times as long for columns as for rows.

    Args:
        dy: N×K×H'×W; x: N×C×H×W, as the placement has cropped it.

    Returns:
        K×C×k×1, in channels_last.
    """
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (dy, x))
    plain = place.kernel[1] == 1 and dy.shape[3] == x.shape[3] and stride == (1, 1) and groups == 1
    (_, k, rows, width), c = dy.shape, x.shape[1]
    pays = rows * width >= LEAST_PIXELS and k * c >= LEAST_PRODUCT
    if not (plain and dense and pays and dy.is_cpu and dy.dtype == torch.float32):
        return None
    grads, pixels = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (dy, x))  # N×(rows·W)×channels
    taps = dy.new_zeros(place.kernel[0], k, c)
    for i, tap in enumerate(taps):
        away = i * place.dilation[0] - place.padding[0]
        first, last = max(0, -away), min(rows, x.shape[2] - away)
        if first < last:
            seen = grads[:, first * width : last * width].mT
            torch.sum(torch.bmm(seen, pixels[:, (first + away) * width : (last + away) * width]), 0, out=tap)
    return taps.permute(1, 2, 0).unsqueeze(3)
