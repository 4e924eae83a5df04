"""Second moments of maps over all pixels: a cross-correlation, and the autocorrelation as its special case.

The C++ kernel (csrc/autocorrelation.cpp) registers itself for the CPU with the schema below; CUDA has Triton
kernels (triton_autocorrelation.py). The plain PyTorch form here computes the same where the extension or Triton is
missing, and what the Triton kernels decline: float64, and shifts that are not neighbours in raster order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import check
from ._extension import LOADED, TRITON

SCHEMA = (
    "cross_correlation(Tensor x, Tensor x_pivot, Tensor y, Tensor y_pivot, int[] rows, int[] columns, int groups)"
    " -> (Tensor, Tensor)"
)


def cross_correlation(
    x: Tensor, x_pivot: Tensor, y: Tensor, y_pivot: Tensor, rows: list[int], columns: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    """Σ_p ỹ[p]·x̃[p+d]ᵀ for each shift d, with x̃ = x − x_pivot and ỹ = y − y_pivot, zero outside the image.

    Accumulated and returned in float32 (float64 for float64 maps), whatever the maps' dtype: a library's weight
    gradient rounds its result to theirs. The C++ kernel's order of summation depends on the shapes alone, not on
    the number of threads.

    Args:
        x: N×C×H×W, any float dtype; channels_last is the layout computed in, others are converted.
        x_pivot: C, subtracted from every pixel, in the result's dtype.
        y: N×K×H×W of x's dtype; y_pivot: K. Passing x itself computes the autocorrelation.
        rows, columns: the shifts d, one entry each a shift.
        groups: channels meet within their group only, as in nn.Conv2d.

    Returns:
        (products, total): shifts×groups×(K/groups)×(C/groups), and Σ_n ỹ[n], K×H×W.

    Raises:
        ValueError: an argument does not fit the others; the message names it.
    """
    _check(x, x_pivot, y, y_pivot, rows, columns, groups)
    x = x.contiguous(memory_format=torch.channels_last)
    y = x if y is x else y.contiguous(memory_format=torch.channels_last)
    return torch.ops.acnet_kernels.cross_correlation(x, x_pivot, y, y_pivot, rows, columns, groups)


def _check(
    x: Tensor, x_pivot: Tensor, y: Tensor, y_pivot: Tensor, rows: list[int], columns: list[int], groups: int
) -> None:
    check.one_device(x=x, x_pivot=x_pivot, y=y, y_pivot=y_pivot)
    check.maps(x=x, y=y)
    if x.shape[0] != y.shape[0] or x.shape[2:] != y.shape[2:]:
        raise ValueError(f"x and y must have the same images and pixels, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype:
        raise ValueError(f"x and y must have one dtype, got {x.dtype} and {y.dtype}")
    if groups < 1 or x.shape[1] % groups or y.shape[1] % groups:
        raise ValueError(f"groups={groups} must divide the channels, {x.shape[1]} and {y.shape[1]}")
    if not rows or len(rows) != len(columns):
        raise ValueError(f"rows and columns must be as long as each other, got {len(rows)} and {len(columns)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    for name, pivot, channels in (("x_pivot", x_pivot, x.shape[1]), ("y_pivot", y_pivot, y.shape[1])):
        if pivot.dtype != dtype or pivot.shape != (channels,) or not pivot.is_contiguous():
            raise ValueError(
                f"{name} must be one {dtype} a channel, {channels} here, contiguous, got {pivot.dtype} of "
                f"{tuple(pivot.shape)} with strides {pivot.stride()}"
            )


def autocorrelation(x: Tensor, pivot: Tensor, rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor]:
    """Σ_q x̃[q]·x̃[q+d]ᵀ for the half plane of shifts |d| ≤ (rows, columns) that starts at 0, in raster order.

    The other half is its transpose. Arguments and results as `cross_correlation`.
    """
    shifts = [(i, j) for i in range(rows + 1) for j in range(-columns if i else 0, columns + 1)]
    return cross_correlation(x, pivot, x, pivot, [i for i, _ in shifts], [j for _, j in shifts], groups)


@check.checked(_check)
def _plain(
    x: Tensor, x_pivot: Tensor, y: Tensor, y_pivot: Tensor, rows: list[int], columns: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    height, width = x.shape[2:]
    centred_y = y.to(y_pivot.dtype).permute(0, 2, 3, 1) - y_pivot  # N×H×W×K
    centred_x = centred_y if x is y else x.to(x_pivot.dtype).permute(0, 2, 3, 1) - x_pivot
    products = centred_y.new_zeros(len(rows), groups, y.shape[1] // groups, x.shape[1] // groups)
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        if abs(row) >= height or abs(column) >= width:
            continue
        fixed = centred_y[:, max(0, -row) : height - max(0, row), max(0, -column) : width - max(0, column)]
        moved = centred_x[:, max(0, row) : height + min(0, row), max(0, column) : width + min(0, column)]
        fixed, moved = (m.reshape(-1, groups, m.shape[-1] // groups).transpose(0, 1) for m in (fixed, moved))
        torch.bmm(fixed.mT, moved, out=products[i])
    return products, centred_y.sum(0).permute(2, 0, 1)


@check.checked(_check)
def on_cuda(
    x: Tensor, x_pivot: Tensor, y: Tensor, y_pivot: Tensor, rows: list[int], columns: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    """`cross_correlation` of channels_last maps by the Triton kernels, or in plain PyTorch where they decline."""
    for name, t in (("x", x), ("y", y)):
        if not t.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} must be in channels_last layout, got strides {t.stride()}")
    if not TRITON:
        return _plain(x, x_pivot, y, y_pivot, rows, columns, groups)
    from . import triton_autocorrelation  # Triton is slow to import, and only CUDA needs it

    if triton_autocorrelation.declines(x, rows, columns) is not None:
        return _plain(x, x_pivot, y, y_pivot, rows, columns, groups)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return triton_autocorrelation.cross_correlation(x, x_pivot, y, y_pivot, rows, columns, groups)


@check.checked(_check)
def _fake(
    x: Tensor, x_pivot: Tensor, y: Tensor, y_pivot: Tensor, rows: list[int], columns: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    products = y_pivot.new_empty(len(rows), groups, y.shape[1] // groups, x.shape[1] // groups)
    return products, y_pivot.new_empty(y.shape[2], y.shape[3], y.shape[1]).permute(2, 0, 1)


_library = torch.library.Library("acnet_kernels", "FRAGMENT")
if not LOADED:
    _library.define(SCHEMA)
    _library.impl("cross_correlation", _plain, "CPU")
_library.impl("cross_correlation", on_cuda, "CUDA")
torch.library.register_fake("acnet_kernels::cross_correlation", _fake)
