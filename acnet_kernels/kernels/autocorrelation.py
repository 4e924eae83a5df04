"""Second moments of two maps, Σ_p ỹ[p]·x̃[p+d]ᵀ with x̃ = x − pivot, zero outside the image; by shift d.

A program takes one shift, one block of channels and one share of the pixels; shares are written apart and added in
a fixed order by wgrad.sum_splits. fp32 products are IEEE: a variance is a small difference of what comes out here.
Half-precision maps go to the tensor cores as they are, which is exact, where the program's pivots are zero; where
they are not, centring is done in fp32, and so are the products.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .taps import dot, index, split_pixel, weight_block


@triton.jit(do_not_specialize=["M", "ROWS", "STRIDE", "FIRST", "ROW", "COL", "WIDTH"])
def cross_correlation(
    x_ptr,
    x_pivot_ptr,
    y_ptr,
    y_pivot_ptr,
    products_ptr,
    M,
    ROWS,
    STRIDE,
    FIRST,
    ROW,
    COL,
    WIDTH,
    C,
    K,
    CG,
    KG,
    H,
    W,
    INT64_OFFSETS: tl.constexpr,
    INTERPRETER_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """products (shifts × groups × KG × CG, fp32) over pixels split·ROWS … of every split, STRIDE elements apart.

    x, y: N×H×W×C and N×H×W×K in memory, M = N·H·W; pivots fp32. Shift s is place FIRST + s, in raster order, of
    rows of WIDTH columns that begin at (ROW, COL).
    Grid: (shifts, groups·⌈KG / BLOCK_K⌉·⌈CG / BLOCK_C⌉, splits): programs that read the same pixels run together.
    """
    shift = tl.program_id(0)
    row = ROW + (FIRST + shift) // WIDTH
    col = COL + (FIRST + shift) % WIDTH
    group, in_group, of_group = weight_block(tl.program_id(1), KG, CG, BLOCK_K, BLOCK_C)
    k = group * KG + in_group
    c = group * CG + of_group
    mask_k = in_group < KG
    mask_c = of_group < CG
    split = tl.program_id(2)
    start = index(split, INT64_OFFSETS) * ROWS
    stop = tl.minimum(start + ROWS, M)
    x_pivot = tl.load(x_pivot_ptr + c, mask=mask_c, other=0.0)
    y_pivot = tl.load(y_pivot_ptr + k, mask=mask_k, other=0.0)
    if x_ptr.dtype.element_ty == tl.float32:
        pivots: tl.constexpr = 1
    else:
        pivots = tl.max((x_pivot != 0.0).to(tl.int32), 0) | tl.max((y_pivot != 0.0).to(tl.int32), 0)
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for centred in tl.static_range(2):  # pivots are subtracted, in fp32, where there are any
        if pivots == centred:
            for first in range(start, stop, BLOCK_M):
                m = first + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
                _, h, w = split_pixel(m, H, W)
                inside = (m < stop) & (h + row >= 0) & (h + row < H) & (w + col >= 0) & (w + col < W)
                y = tl.load(y_ptr + m[:, None] * K + k[None, :], mask=inside[:, None] & mask_k[None, :], other=0.0)
                at = (m + row * W + col) * C
                x = tl.load(x_ptr + at[:, None] + c[None, :], mask=inside[:, None] & mask_c[None, :], other=0.0)
                if centred:
                    y = tl.where(inside[:, None], y.to(tl.float32) - y_pivot[None, :], 0.0)
                    x = x.to(tl.float32) - x_pivot[None, :]
                acc = dot(tl.trans(y), x, acc, "ieee", INTERPRETER_FP32)
    at = ((shift * (K // KG) + group) * KG + in_group)[:, None] * CG + of_group[None, :]
    products = products_ptr + split.to(tl.int64) * STRIDE + at
    tl.store(products, acc, mask=mask_k[:, None] & mask_c[None, :])


@triton.jit(do_not_specialize=["N", "PIXELS"])
def centred_total(y_ptr, pivot_ptr, total_ptr, N, PIXELS, K, BLOCK: tl.constexpr):
    """total = Σ_n (y[n] − pivot), PIXELS×K of fp32. Grid: blocks of total's elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = PIXELS.to(tl.int64) * K
    mask = at < size
    pivot = tl.load(pivot_ptr + at % K, mask=mask, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    source = y_ptr + at
    for _ in range(N):
        total += tl.load(source, mask=mask, other=0.0).to(tl.float32) - pivot
        source += size
    tl.store(total_ptr + at, total, mask=mask)
