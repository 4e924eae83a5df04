"""The weights' gradients: a program takes one tap of one branch, one block of channels and one share of the pixels.

dW_b[:, :, tap] = dy_bᵀ · x at that tap. Programs of a tap's all branches would load its x once for them, and most
would wait for the centre's. Shares of the pixels are written apart and added in a fixed order by `sum_splits`.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .taps import branch_count, dot, index, multiple, own_tap, split_pixel, taps_before, weight_block


@triton.jit(do_not_specialize=["M", "ROWS", "STRIDE", "H", "W", "OH", "OW"])
def conv_wgrad(
    x_ptr,
    dys,
    dws,
    M,
    ROWS,
    STRIDE,
    C,
    K,
    CG,
    KG,
    H,
    W,
    OH,
    OW,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR_C: tl.constexpr,
    VECTOR_K: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETER_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW_b over pixels split·ROWS … of every split.

    dws: a pointer a branch, in the weights' memory format; split s writes STRIDE·s elements behind it. The rest is
    as conv_branches takes it. Grid: (groups·⌈KG / BLOCK_K⌉·⌈CG / BLOCK_C⌉, taps of every branch, splits).
    """
    C, CG = multiple(C, VECTOR_C), multiple(CG, VECTOR_C)
    K, KG = multiple(K, VECTOR_K), multiple(KG, VECTOR_K)
    group, in_group, c = weight_block(tl.program_id(0), KG, CG, BLOCK_K, BLOCK_C)
    k = group * KG + in_group
    mask_k = in_group < KG
    mask_c = c < CG
    # The branch's tap, its place in the window, and the branch's pointers and number of taps.
    tap = tl.program_id(1)
    row, col, taps = own_tap(tap, WINDOW, 0)
    dy_ptr, dw_ptr = dys[0], dws[0]
    for b in tl.static_range(1, branch_count(WINDOW)):
        if tl.program_id(1) >= taps_before(WINDOW, b):
            tap = tl.program_id(1) - taps_before(WINDOW, b)
            row, col, taps = own_tap(tap, WINDOW, b)
            dy_ptr, dw_ptr = dys[b], dws[b]
    split = tl.program_id(2)
    start = index(split, INT64_OFFSETS) * ROWS
    stop = tl.minimum(start + ROWS, M)
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_M):
        m = first + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
        n, oh, ow = split_pixel(m, OH, OW)
        h = oh * WINDOW.stride_h - WINDOW.pad_h + row * WINDOW.dil_h
        w = ow * WINDOW.stride_w - WINDOW.pad_w + col * WINDOW.dil_w
        inside = (m < stop) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = ((n * H + h) * W + w) * C + group * CG
        x = tl.load(x_ptr + at[:, None] + c[None, :], mask=inside[:, None] & mask_c[None, :], other=0.0)
        mask_dy = (m < stop)[:, None] & mask_k[None, :]
        dy = tl.load(dy_ptr + m[:, None] * K + k[None, :], mask=mask_dy, other=0.0)
        acc = dot(tl.trans(dy), x, acc, PRECISION, INTERPRETER_FP32)
    if CHANNELS_LAST:
        at = (k[:, None] * taps + tap) * CG + c[None, :]
    else:
        at = (k[:, None] * CG + c[None, :]) * taps + tap
    into = dw_ptr + split.to(tl.int64) * STRIDE + at
    tl.store(into, acc.to(dw_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_c[None, :])


@triton.jit(do_not_specialize=["SPLITS", "STRIDE"])
def sum_splits(partials, dws, sizes, SPLITS, STRIDE, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """dws[b] = Σ_s of sizes[b] numbers at partials[b] + s·STRIDE, BLOCK_S of them read at once, in a fixed order.

    Grid: (most blocks, tensors).
    """
    TENSORS: tl.constexpr = len(dws)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for b in tl.static_range(TENSORS):
        if tl.program_id(1) == b:
            mask = at < sizes[b]
            totals = tl.zeros((BLOCK_S, BLOCK), tl.float32)
            split = tl.arange(0, BLOCK_S)
            source = partials[b] + split.to(tl.int64)[:, None] * STRIDE + at[None, :]
            for first in range(0, SPLITS, BLOCK_S):
                totals += tl.load(source, mask=(first + split < SPLITS)[:, None] & mask[None, :], other=0.0)
                source += STRIDE.to(tl.int64) * BLOCK_S
            tl.store(dws[b] + at, tl.sum(totals, 0).to(dws[b].dtype.element_ty), mask=mask)
