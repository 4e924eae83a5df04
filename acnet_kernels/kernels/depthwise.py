"""The three convolution phases where every group has one input channel: memory-bound, without matrix products.

Output channel k reads input channel k // KG (KG outputs a group). A program's tile is pixels × channels, channels
adjacent in memory; neighbouring taps find their pixels in the cache, so a map is read from memory about once. The
taps of a row are unrolled: all of the window's would take every register there is. Arithmetic is fp32 whatever the
maps' type. The weights, K×1×rows×columns, are the same in either memory format. Arguments are those of the kernels
in conv.py, dgrad.py and wgrad.py.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .bn_sum import merge_moments, store_moments, tile_moments
from .taps import (
    branch_count,
    end_row,
    first_row,
    has_all_rows,
    has_column,
    has_row,
    index,
    replaced,
    size_of,
    split_pixel,
    tap_number,
    wanting,
)


@triton.jit
def _weight(w_ptr, k, mask_k, tap, TAPS: tl.constexpr):
    """A tap of every channel, broadcast over the tile's pixels."""
    return tl.load(w_ptr + k * TAPS + tap, mask=mask_k, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M", "ROWS", "TILES"])
def depthwise_branches(
    x_ptr,
    weights,
    ys,
    partial_ptr,
    M,
    ROWS,
    TILES,
    C,
    K,
    KG,
    H,
    W,
    OH,
    OW,
    WINDOW: tl.constexpr,
    STORE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_b = W_b * x and the mean and M2 of every ROWS pixels (partial: B×2×K×TILES).

    Grid: (TILES, channel blocks).
    """
    BRANCHES: tl.constexpr = branch_count(WINDOW)
    KERNEL_W: tl.constexpr = WINDOW.kernel_w
    tile = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    c = k // KG
    start = index(tile, INT64_OFFSETS) * ROWS
    stop = tl.minimum(start + ROWS, M)
    no_pixels = tl.zeros((BLOCK_K,), tl.float32)
    means, m2s = (no_pixels, no_pixels, no_pixels), (no_pixels, no_pixels, no_pixels)
    for first in range(start, stop, BLOCK_M):
        m = first + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
        mask_m = m < stop
        n, oh, ow = split_pixel(m, OH, OW)
        h0 = oh * WINDOW.stride_h - WINDOW.pad_h
        w0 = ow * WINDOW.stride_w - WINDOW.pad_w
        pixel = (n * H + h0) * W + w0
        zeros = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        accs = (zeros, zeros, zeros)
        for row in range(first_row(WINDOW), end_row(WINDOW)):
            h = h0 + row * WINDOW.dil_h
            in_row = mask_m & (h >= 0) & (h < H)
            for col in tl.static_range(KERNEL_W):
                if wanting(WINDOW, 1)[col]:
                    w = w0 + col * WINDOW.dil_w
                    inside = in_row & (w >= 0) & (w < W)
                    at = (pixel + row * WINDOW.dil_h * W + col * WINDOW.dil_w) * C
                    x = tl.load(x_ptr + at[:, None] + c[None, :], mask=inside[:, None] & mask_k[None, :], other=0.0)
                    x = x.to(tl.float32)
                    for b in tl.static_range(BRANCHES):
                        if has_column(WINDOW, b, col) and (has_all_rows(WINDOW, b) or has_row(row, WINDOW, b)):
                            tap = tap_number(row, col, WINDOW, b)
                            product = x * _weight(weights[b], k, mask_k, tap, size_of(WINDOW, b))
                            accs = replaced(accs, b, accs[b] + product)
        before = (first - start).to(tl.float32)
        count = tl.minimum(stop - first, BLOCK_M).to(tl.float32)
        for b in tl.static_range(BRANCHES):
            y = accs[b]
            if STORE:
                stored = y.to(ys[b].dtype.element_ty)
                tl.store(ys[b] + m[:, None] * K + k[None, :], stored, mask=mask_m[:, None] & mask_k[None, :])
                y = stored.to(tl.float32)  # what is normalised is the map as stored
            mean, m2 = tile_moments(y, mask_m, count)
            mean, m2 = merge_moments(means[b], m2s[b], before, mean, m2, count)
            means, m2s = replaced(means, b, mean), replaced(m2s, b, m2)
    for b in tl.static_range(BRANCHES):
        store_moments(partial_ptr, means[b], m2s[b], b, k, mask_k, K, tile, TILES)


@triton.jit(do_not_specialize=["M"])
def depthwise_dgrad(
    dys,
    weights,
    dx_ptr,
    M,
    C,
    K,
    KG,
    H,
    W,
    OH,
    OW,
    WINDOW: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = Σ_b the transposed convolution of dy_b with W_b, for M input pixels.

    Where a stride leaves a tap out, its load is masked: it moves no memory.
    Grid: (pixel blocks, channel blocks).
    """
    KERNEL_W: tl.constexpr = WINDOW.kernel_w
    c = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = c < C
    m = index(tl.program_id(0), INT64_OFFSETS) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < M
    n, h, w = split_pixel(m, H, W)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for row in range(first_row(WINDOW), end_row(WINDOW)):
        down = h + WINDOW.pad_h - row * WINDOW.dil_h
        in_row = mask_m & (down >= 0) & (down % WINDOW.stride_h == 0)
        down = down // WINDOW.stride_h
        in_row = in_row & (down < OH)
        row_at = (n * OH + down) * OW
        for col in tl.static_range(KERNEL_W):
            if wanting(WINDOW, 1)[col]:
                right = w + WINDOW.pad_w - col * WINDOW.dil_w
                inside = in_row & (right >= 0) & (right % WINDOW.stride_w == 0)
                right = right // WINDOW.stride_w
                inside = (inside & (right < OW))[:, None] & mask_c[None, :]
                at = (row_at + right) * K
                for j in range(KG):
                    k = c * KG + j
                    for b in tl.static_range(branch_count(WINDOW)):
                        if has_column(WINDOW, b, col) and (has_all_rows(WINDOW, b) or has_row(row, WINDOW, b)):
                            dy = tl.load(dys[b] + at[:, None] + k[None, :], mask=inside, other=0.0)
                            tap = tap_number(row, col, WINDOW, b)
                            acc += dy.to(tl.float32) * _weight(weights[b], k, mask_c, tap, size_of(WINDOW, b))
    out = dx_ptr + m[:, None] * C + c[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.constexpr_function
def tile_columns(window, branch):
    """The branch's columns, and as many more as make a power of two."""
    return 1 << (window[-1][branch][3] - 1).bit_length()


@triton.jit(do_not_specialize=["M", "ROWS", "STRIDE"])
def depthwise_wgrad(
    x_ptr,
    dys,
    dws,
    M,
    ROWS,
    STRIDE,
    C,
    K,
    KG,
    H,
    W,
    OH,
    OW,
    WINDOW: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW_b over pixels split·ROWS … of every split; a program takes one row of the window.

    The row's taps are an axis of a branch's tile. Split s writes STRIDE·s elements behind every dws
    (wgrad.sum_splits). Grid: (channel blocks, rows from first_row to end_row, splits).
    """
    BRANCHES: tl.constexpr = branch_count(WINDOW)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    c = k // KG
    row = first_row(WINDOW) + tl.program_id(1)
    split = tl.program_id(2)
    start = index(split, INT64_OFFSETS) * ROWS
    stop = tl.minimum(start + ROWS, M)
    into = split.to(tl.int64) * STRIDE
    zeros = tl.zeros((BLOCK_K,), tl.float32)
    accs = (zeros, zeros, zeros)
    for b in tl.static_range(BRANCHES):
        accs = replaced(accs, b, tl.zeros((BLOCK_M, tile_columns(WINDOW, b), BLOCK_K), tl.float32))
    for first in range(start, stop, BLOCK_M):
        m = first + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
        mask_m = m < stop
        n, oh, ow = split_pixel(m, OH, OW)
        h = oh * WINDOW.stride_h - WINDOW.pad_h + row * WINDOW.dil_h
        w0 = (ow * WINDOW.stride_w - WINDOW.pad_w)[:, None]
        row_at = ((n * H + h) * W)[:, None]
        in_row = (mask_m & (h >= 0) & (h < H))[:, None]
        mask_y = mask_m[:, None] & mask_k[None, :]
        at = m[:, None] * K + k[None, :]
        for b in tl.static_range(BRANCHES):
            j = tl.arange(0, tile_columns(WINDOW, b))[None, :]
            w = w0 + (WINDOW.branches[b].column + j * WINDOW.branches[b].step) * WINDOW.dil_w
            inside = in_row & (j < WINDOW.branches[b].columns) & (w >= 0) & (w < W)
            x_at = ((row_at + w) * C)[:, :, None] + c[None, None, :]
            mask_dy = mask_y if has_all_rows(WINDOW, b) else mask_y & has_row(row, WINDOW, b)
            dy = tl.load(dys[b] + at, mask=mask_dy, other=0.0)
            x = tl.load(x_ptr + x_at, mask=inside[:, :, None] & mask_k[None, None, :], other=0.0)
            accs = replaced(accs, b, accs[b] + x.to(tl.float32) * dy.to(tl.float32)[:, None, :])
    for b in tl.static_range(BRANCHES):
        j = tl.arange(0, tile_columns(WINDOW, b))[:, None]
        tap = tap_number(row, WINDOW.branches[b].column, WINDOW, b) + j
        mask = mask_k[None, :] & (j < WINDOW.branches[b].columns) & has_row(row, WINDOW, b)
        dw = dws[b] + into + (k * size_of(WINDOW, b))[None, :] + tap
        tl.store(dw, tl.sum(accs[b], 0).to(dws[b].dtype.element_ty), mask=mask)
