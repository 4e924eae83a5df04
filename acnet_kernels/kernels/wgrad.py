"""The weights' gradients: a program takes one tap of the window, one block of channels and one share of the pixels.

dW_b[:, :, tap] = dy_bᵀ · x at that tap; an x tile is loaded once for every branch its tap belongs to. Shares of the
pixels are written apart and added in a fixed order by `sum_splits`.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .taps import class_size, class_tap, dot, index, split_pixel, weight_block


@triton.jit
def _store(dw_ptr, acc, place, tap, CG, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """dW[k, c, tap] = acc at place, (k, c, k_live, c_live)."""
    k, c, k_live, c_live = place
    if CHANNELS_LAST:
        at = (k[:, None] * TAPS + tap) * CG + c[None, :]
    else:
        at = (k[:, None] * CG + c[None, :]) * TAPS + tap
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=k_live[:, None] & c_live[None, :])


@triton.constexpr_function
def class_begin(kernel, kind):
    """Number of the first tap of a class, as programs take them: crossing, row, column, neither."""
    return 0 if kind == 0 else 1 + (kind - 1) * (kernel - 1)


@triton.jit(do_not_specialize=["M", "ROWS", "STRIDE"])
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
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW_b over pixels split·ROWS … of every split.

    dws: a pointer a branch, in the weights' memory format; split s writes STRIDE·s elements behind it. The rest is
    as conv_branches takes it. Grid: (groups·⌈KG / BLOCK_K⌉·⌈CG / BLOCK_C⌉, k², splits); taps of several branches
    come first, as their programs take longest.
    """
    group, in_group, c = weight_block(tl.program_id(0), KG, CG, BLOCK_K, BLOCK_C)
    k = group * KG + in_group
    k_live = in_group < KG
    c_live = c < CG
    tap = tl.program_id(1)
    split = tl.program_id(2)
    start = index(split, WIDE) * ROWS
    stop = tl.minimum(start + ROWS, M)
    into = split.to(tl.int64) * STRIDE
    # The class of this program's tap: crossing, on the row, on the column, neither.
    for kind in tl.static_range(4):
        size = class_size(WINDOW.kernel, kind < 2, kind % 2 == 0)
        i = tap - class_begin(WINDOW.kernel, kind)
        if i >= 0 and i < size:
            row, col = class_tap(i, WINDOW, kind < 2, kind % 2 == 0)
            sq = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
            hor = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
            ver = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
            for first in range(start, stop, BLOCK_M):
                m = first + index(tl.arange(0, BLOCK_M), WIDE)
                n, oh, ow = split_pixel(m, OH, OW)
                h = oh * WINDOW.stride_h - WINDOW.pad_h + row * WINDOW.dil_h
                w = ow * WINDOW.stride_w - WINDOW.pad_w + col * WINDOW.dil_w
                inside = (m < stop) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = ((n * H + h) * W + w) * C + group * CG
                x = tl.load(x_ptr + at[:, None] + c[None, :], mask=inside[:, None] & c_live[None, :], other=0.0)
                at = m[:, None] * K + k[None, :]
                live = (m < stop)[:, None] & k_live[None, :]
                sq = dot(tl.trans(tl.load(dys[0] + at, mask=live, other=0.0)), x, sq, PRECISION, UPCAST)
                if kind < 2 and dws[1] is not None:
                    hor = dot(tl.trans(tl.load(dys[1] + at, mask=live, other=0.0)), x, hor, PRECISION, UPCAST)
                if kind % 2 == 0 and dws[2] is not None:
                    ver = dot(tl.trans(tl.load(dys[2] + at, mask=live, other=0.0)), x, ver, PRECISION, UPCAST)
            place = (k, c, k_live, c_live)
            number = row * WINDOW.kernel + col
            _store(dws[0] + into, sq, place, number, CG, WINDOW.kernel * WINDOW.kernel, CHANNELS_LAST)
            if kind < 2 and dws[1] is not None:
                _store(dws[1] + into, hor, place, col, CG, WINDOW.kernel, CHANNELS_LAST)
            if kind % 2 == 0 and dws[2] is not None:
                _store(dws[2] + into, ver, place, row, CG, WINDOW.kernel, CHANNELS_LAST)


@triton.jit(do_not_specialize=["SPLITS", "STRIDE"])
def sum_splits(partials, dws, sizes, SPLITS, STRIDE, BLOCK: tl.constexpr):
    """dws[b] = Σ_s of sizes[b] numbers at partials[b] + s·STRIDE, s ascending. Grid: (largest's blocks, 3)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for b in tl.static_range(3):
        if dws[b] is not None and tl.program_id(1) == b:
            live = at < sizes[b]
            total = tl.zeros((BLOCK,), tl.float32)
            source = partials[b] + at
            for _ in range(SPLITS):
                total += tl.load(source, mask=live, other=0.0)
                source += STRIDE
            tl.store(dws[b] + at, total.to(dws[b].dtype.element_ty), mask=live)
