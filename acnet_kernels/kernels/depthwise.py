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
from .taps import index, split_pixel


@triton.jit
def _weight(w_ptr, k, k_live, tap, TAPS: tl.constexpr):
    """A tap of every channel, broadcast over the tile's pixels."""
    return tl.load(w_ptr + k * TAPS + tap, mask=k_live, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish(acc, mean, m2, y_ptr, m, live, k, k_live, K, before, count, STORE: tl.constexpr):
    """Stores a branch's tile; the moments of the rows `before` it merged with its own."""
    if STORE:
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + m[:, None] * K + k[None, :], y, mask=live[:, None] & k_live[None, :])
        acc = y.to(tl.float32)  # what is normalised is the map as stored
    block_mean, block_m2 = tile_moments(acc, live, count)
    return merge_moments(mean, m2, before, block_mean, block_m2, count)


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
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_b = W_b * x and the mean and M2 of every ROWS pixels (partial: B×2×K×TILES).

    Grid: (TILES, channel blocks).
    """
    KERNEL: tl.constexpr = WINDOW.kernel
    tile = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_live = k < K
    c = k // KG
    start = index(tile, WIDE) * ROWS
    stop = tl.minimum(start + ROWS, M)
    sq_mean = tl.zeros((BLOCK_K,), tl.float32)
    hor_mean, ver_mean, sq_m2, hor_m2, ver_m2 = sq_mean, sq_mean, sq_mean, sq_mean, sq_mean
    for first in range(start, stop, BLOCK_M):
        m = first + index(tl.arange(0, BLOCK_M), WIDE)
        live = m < stop
        n, oh, ow = split_pixel(m, OH, OW)
        h0 = oh * WINDOW.stride_h - WINDOW.pad_h
        w0 = ow * WINDOW.stride_w - WINDOW.pad_w
        pixel = (n * H + h0) * W + w0
        sq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        hor = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        ver = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for row in range(KERNEL):
            h = h0 + row * WINDOW.dil_h
            in_row = live & (h >= 0) & (h < H)
            for col in tl.static_range(KERNEL):
                w = w0 + col * WINDOW.dil_w
                inside = in_row & (w >= 0) & (w < W)
                at = (pixel + row * WINDOW.dil_h * W + col * WINDOW.dil_w) * C
                x = tl.load(x_ptr + at[:, None] + c[None, :], mask=inside[:, None] & k_live[None, :], other=0.0)
                x = x.to(tl.float32)
                sq += x * _weight(weights[0], k, k_live, row * KERNEL + col, KERNEL * KERNEL)
                if weights[1] is not None and row == WINDOW.hor_row:
                    hor += x * _weight(weights[1], k, k_live, col, KERNEL)
                if col == WINDOW.ver_col and weights[2] is not None:
                    ver += x * _weight(weights[2], k, k_live, row, KERNEL)
        before = (first - start).to(tl.float32)
        count = tl.minimum(stop - first, BLOCK_M).to(tl.float32)
        sq_mean, sq_m2 = _finish(sq, sq_mean, sq_m2, ys[0], m, live, k, k_live, K, before, count, STORE)
        if weights[1] is not None:
            hor_mean, hor_m2 = _finish(hor, hor_mean, hor_m2, ys[1], m, live, k, k_live, K, before, count, STORE)
        if weights[2] is not None:
            ver_mean, ver_m2 = _finish(ver, ver_mean, ver_m2, ys[2], m, live, k, k_live, K, before, count, STORE)
    store_moments(partial_ptr, sq_mean, sq_m2, 0, k, k_live, K, tile, TILES)
    if weights[1] is not None:
        store_moments(partial_ptr, hor_mean, hor_m2, 1, k, k_live, K, tile, TILES)
    if weights[2] is not None:
        AFTER: tl.constexpr = 1 if weights[1] is None else 2
        store_moments(partial_ptr, ver_mean, ver_m2, AFTER, k, k_live, K, tile, TILES)


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
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = Σ_b the transposed convolution of dy_b with W_b, for M input pixels.

    Where a stride or hor's one row leaves a tap out, its load is masked: it moves no memory.
    Grid: (pixel blocks, channel blocks).
    """
    KERNEL: tl.constexpr = WINDOW.kernel
    c = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c_live = c < C
    m = index(tl.program_id(0), WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < M
    n, h, w = split_pixel(m, H, W)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for row in range(KERNEL):
        down = h + WINDOW.pad_h - row * WINDOW.dil_h
        in_row = live & (down >= 0) & (down % WINDOW.stride_h == 0)
        down = down // WINDOW.stride_h
        in_row = in_row & (down < OH)
        row_at = (n * OH + down) * OW
        for col in tl.static_range(KERNEL):
            right = w + WINDOW.pad_w - col * WINDOW.dil_w
            inside = in_row & (right >= 0) & (right % WINDOW.stride_w == 0)
            right = right // WINDOW.stride_w
            inside = (inside & (right < OW))[:, None] & c_live[None, :]
            at = (row_at + right) * K
            for j in range(KG):
                k = c * KG + j
                dy = tl.load(dys[0] + at[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
                acc += dy * _weight(weights[0], k, c_live, row * KERNEL + col, KERNEL * KERNEL)
                if weights[1] is not None and row == WINDOW.hor_row:
                    dy = tl.load(dys[1] + at[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
                    acc += dy * _weight(weights[1], k, c_live, col, KERNEL)
                if col == WINDOW.ver_col and weights[2] is not None:
                    dy = tl.load(dys[2] + at[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
                    acc += dy * _weight(weights[2], k, c_live, row, KERNEL)
    out = dx_ptr + m[:, None] * C + c[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=live[:, None] & c_live[None, :])


@triton.jit
def _row_of_x(x_ptr, row_at, w, inside, c, c_live, W, C):
    """x at columns w (pixels×columns) of each pixel's row, in fp32: pixels × columns × channels."""
    inside = inside & (w >= 0) & (w < W)
    at = (row_at + w) * C
    live = inside[:, :, None] & c_live[None, None, :]
    return tl.load(x_ptr + at[:, :, None] + c[None, None, :], mask=live, other=0.0).to(tl.float32)


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
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dW_b over pixels split·ROWS … of every split; a program takes one row of the window.

    The row's taps are an axis of the tile, BLOCK_T long: a power of two, the kernel's size or more. Split s writes
    STRIDE·s elements behind every dws (wgrad.sum_splits).
    Grid: (channel blocks, kernel rows, splits).
    """
    KERNEL: tl.constexpr = WINDOW.kernel
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_live = k < K
    c = k // KG
    row = tl.program_id(1)
    col = tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    start = index(split, WIDE) * ROWS
    stop = tl.minimum(start + ROWS, M)
    into = split.to(tl.int64) * STRIDE
    sq = tl.zeros((BLOCK_M, BLOCK_T, BLOCK_K), tl.float32)
    hor = tl.zeros((BLOCK_M, BLOCK_T, BLOCK_K), tl.float32)
    ver = tl.zeros((BLOCK_M, 1, BLOCK_K), tl.float32)
    for first in range(start, stop, BLOCK_M):
        m = first + index(tl.arange(0, BLOCK_M), WIDE)
        n, oh, ow = split_pixel(m, OH, OW)
        h = oh * WINDOW.stride_h - WINDOW.pad_h + row * WINDOW.dil_h
        w0 = (ow * WINDOW.stride_w - WINDOW.pad_w)[:, None]
        row_at = ((n * H + h) * W)[:, None]
        inside = ((m < stop) & (h >= 0) & (h < H))[:, None]
        live = (m < stop)[:, None] & k_live[None, :]
        at = m[:, None] * K + k[None, :]
        x = _row_of_x(
            x_ptr, row_at, w0 + col[None, :] * WINDOW.dil_w, inside & (col < KERNEL)[None, :], c, k_live, W, C
        )
        dy = tl.load(dys[0] + at, mask=live, other=0.0).to(tl.float32)
        sq += x * dy[:, None, :]
        if dws[1] is not None:
            dy = tl.load(dys[1] + at, mask=live & (row == WINDOW.hor_row), other=0.0).to(tl.float32)
            hor += x * dy[:, None, :]
        if dws[2] is not None:
            x = _row_of_x(x_ptr, row_at, w0 + WINDOW.ver_col * WINDOW.dil_w, inside, c, k_live, W, C)
            dy = tl.load(dys[2] + at, mask=live, other=0.0).to(tl.float32)
            ver += x * dy[:, None, :]
    taps = k_live[None, :] & (col < KERNEL)[:, None]
    at = into + (k * KERNEL)[None, :]
    dw = dws[0] + into + (k * KERNEL * KERNEL)[None, :] + row * KERNEL + col[:, None]
    tl.store(dw, tl.sum(sq, 0).to(dws[0].dtype.element_ty), mask=taps)
    if dws[1] is not None:
        tl.store(
            dws[1] + at + col[:, None],
            tl.sum(hor, 0).to(dws[1].dtype.element_ty),
            mask=taps & (row == WINDOW.hor_row),
        )
    if dws[2] is not None:
        tl.store(dws[2] + at + row, tl.sum(ver, 0).to(dws[2].dtype.element_ty), mask=k_live[None, :])
