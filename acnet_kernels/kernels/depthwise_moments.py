"""The four passes over maps of a depthwise block by moments, and the mean they centre by (docs/depthwise.md).

Everything is of x̃ = x − pivot, the padding's zeros included, which are −pivot: a constant that all of M outputs see
alike. Covariances do not depend on it, and what else does takes it back in float64, from sums that are kept apart
nowhere by how much of the padding a tap sees. Arithmetic is float32; sums of it are added up in float64, and stored
one a task, for depthwise_algebra.merge to add in a fixed order.

A program's tile is pixels × channels, of maps of any strides: where channels are adjacent, a block of them; where
they are not, one channel. Output channel k reads input channel k // KG.

ACTIVATION, as kernels/epilogue.py has it, is what follows the sum, and residual_ptr, None for none, a map of the
output's strides that is added before. Of the gradients the first pass takes its slope, and leaves g·act'(z) for the
second: that would read a clamp's output once a tap, and compute the others' z as often.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .epilogue import activated, is_smooth, smooth_slope, where_steep
from .rectangles import FIELDS as _FIELDS
from .taps import index, replaced, split_pixel

FIELDS = tl.constexpr(_FIELDS)


# Compile-time functions of a window.Window; shifts are the half plane from (0, 0) on, in raster order.
@triton.constexpr_function
def shift_count(window):
    """Number of shifts between two of the window's taps, of the half plane."""
    return window[1] + (window[0] - 1) * (2 * window[1] - 1)


@triton.constexpr_function
def shift_row(window, shift):
    """How many taps below."""
    return 0 if shift < window[1] else 1 + (shift - window[1]) // (2 * window[1] - 1)


@triton.constexpr_function
def shift_column(window, shift):
    """How many taps to the right."""
    columns = window[1]
    return shift if shift < columns else (shift - columns) % (2 * columns - 1) - (columns - 1)


@triton.jit
def _rectangle_of(task, rects_ptr, RECTS, MOST_RECTS: tl.constexpr):
    """The rectangle that has a task."""
    r = tl.arange(0, MOST_RECTS)
    firsts = tl.load(rects_ptr + r * FIELDS, mask=r < RECTS, other=2147483647)
    return tl.sum((firsts <= task).to(tl.int32), 0) - 1


@triton.jit
def _block(count, BLOCK_K: tl.constexpr):
    """(this program's number among those of its channels, its channels, which of them there are)."""
    blocks = tl.cdiv(count, BLOCK_K)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    return tl.program_id(0) // blocks, k, k < count


@triton.jit
def _offsets(n, h, w, c, SN, SC, SH, SW, INT64_OFFSETS: tl.constexpr):
    """Of pixels × channels of a map."""
    pixels = n * SN + index(h, INT64_OFFSETS) * SH + index(w, INT64_OFFSETS) * SW
    return pixels[:, None] + (index(c, INT64_OFFSETS) * SC)[None, :]


@triton.jit
def _shift(down, right, SH, SW, INT64_OFFSETS: tl.constexpr):
    """From a pixel to another."""
    type: tl.constexpr = tl.int64 if INT64_OFFSETS else tl.int32
    return tl.full((), down, type) * SH + tl.full((), right, type) * SW


@triton.jit
def _store_sum(partial_ptr, task, number, k, live, COUNT, NUMBERS: tl.constexpr, acc):
    at = (task.to(tl.int64) * NUMBERS + number) * COUNT
    tl.store(partial_ptr + at + k, tl.sum(acc.to(tl.float64), 0), mask=live)


@triton.jit(do_not_specialize=["N", "H", "W"])
def channel_pivots(
    x_ptr, pivot_ptr, N, C, H, W, SN, SC, SH, SW, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """About the mean of every channel, from at most ROWS×COLUMNS pixels; 0 where it is not finite; a float32 number
    in float64. Grid: channel blocks.
    """
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    s = tl.arange(0, ROWS * COLUMNS)
    rows = N.to(tl.int64) * H
    taken = tl.minimum(rows, ROWS)
    step = tl.cdiv(W, COLUMNS)
    row = (s // COLUMNS) * rows // taken
    column = (s % COLUMNS) * step
    live = (s // COLUMNS < taken) & (column < W)
    at = row // H * SN + row % H * SH + column * SW
    there = live[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at[:, None] + c.to(tl.int64)[None, :] * SC, mask=there, other=0.0).to(tl.float64)
    mean = (tl.sum(x, 0) / tl.sum(live.to(tl.float64), 0)).to(tl.float32)
    tl.store(pivot_ptr + c, tl.where(tl.abs(mean) < float("inf"), mean, 0.0).to(tl.float64), mask=c < C)


@triton.jit(do_not_specialize=["RECTS", "SHARE", "N", "H", "W"])
def autocorrelate(
    x_ptr,
    pivot_ptr,
    rects_ptr,
    partial_ptr,
    RECTS,
    SHARE,
    N,
    C,
    H,
    W,
    SN,
    SC,
    SH,
    SW,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    MOST_RECTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ x̃[q]·x̃[q+d] for every shift d, and Σ x̃[q], over the pixels q of a task (partial: tasks×(shifts + 1)×C).

    The rectangles are rectangles.padded. WIDE: products and sums are float64, of few pixels.
    Grid: tasks × channel blocks.
    """
    SHIFTS: tl.constexpr = shift_count(WINDOW)
    task, c, live_c = _block(C, BLOCK_K)
    rect = rects_ptr + _rectangle_of(task, rects_ptr, RECTS, MOST_RECTS) * FIELDS
    top, rows = tl.load(rect + 1), tl.load(rect + 2)
    left, columns = tl.load(rect + 3), tl.load(rect + 4)
    start = index(task - tl.load(rect), INT64_OFFSETS) * SHARE
    stop = tl.minimum(start + SHARE, index(rows, INT64_OFFSETS) * columns * N)
    pivot = tl.load(pivot_ptr + c, mask=live_c, other=0.0)
    pivot = (pivot if WIDE else pivot.to(tl.float32))[None, :]
    zeros = tl.zeros((BLOCK_M, BLOCK_K), tl.float64 if WIDE else tl.float32)
    accs = (zeros,) * (SHIFTS + 1)
    for first in range(start, stop, BLOCK_M):
        i = first + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
        live = i < stop
        n, row, column = split_pixel(i, rows, columns)
        h = top + row * WINDOW.stride_h
        w = left + column * WINDOW.stride_w
        pixel = x_ptr + _offsets(n, h, w, c, SN, SC, SH, SW, INT64_OFFSETS)
        inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(pixel, mask=inside[:, None] & live_c[None, :], other=0.0)
        x = tl.where(live[:, None], x.to(zeros.dtype) - pivot, 0.0)
        accs = replaced(accs, SHIFTS, accs[SHIFTS] + x)
        for s in tl.static_range(SHIFTS):
            down = shift_row(WINDOW, s) * WINDOW.dil_h
            right = shift_column(WINDOW, s) * WINDOW.dil_w
            if s == 0:
                y = x
            else:
                inside = live & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
                moved = pixel + _shift(down, right, SH, SW, INT64_OFFSETS)
                y = tl.load(moved, mask=inside[:, None] & live_c[None, :], other=0.0).to(zeros.dtype) - pivot
            accs = replaced(accs, s, accs[s] + x * y)
    for s in tl.static_range(SHIFTS + 1):
        _store_sum(partial_ptr, task, s, c, live_c, C, SHIFTS + 1, accs[s])


@triton.jit
def _sum(
    pixel,
    live,
    h0,
    w0,
    k,
    live_k,
    pivot,
    folded_ptr,
    K,
    H,
    W,
    SH,
    SW,
    WINDOW: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """level + Σ_t kernel[t]·x̃[p, t] of pixels whose windows begin at h0, w0, and at `pixel` in memory."""
    KERNEL_W: tl.constexpr = WINDOW.kernel_w
    TAPS: tl.constexpr = WINDOW.kernel_h * WINDOW.kernel_w
    level = tl.load(folded_ptr + TAPS * K + k, mask=live_k, other=0.0)
    acc = tl.zeros((BLOCK_M, k.shape[0]), tl.float32) + level[None, :]
    for row in range(WINDOW.kernel_h):
        h = h0 + row * WINDOW.dil_h
        in_row = live & (h >= 0) & (h < H)
        for col in tl.static_range(KERNEL_W):
            w = w0 + col * WINDOW.dil_w
            inside = in_row & (w >= 0) & (w < W)
            seen = pixel + _shift(row * WINDOW.dil_h, col * WINDOW.dil_w, SH, SW, INT64_OFFSETS)
            x = tl.load(seen, mask=inside[:, None] & live_k[None, :], other=0.0).to(tl.float32)
            weight = tl.load(folded_ptr + (row * KERNEL_W + col) * K + k, mask=live_k, other=0.0)
            acc += weight[None, :] * (x - pivot)
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def convolve(
    x_ptr,
    pivot_ptr,
    folded_ptr,
    residual_ptr,
    out_ptr,
    M,
    C,
    K,
    KG,
    H,
    W,
    OH,
    OW,
    SN,
    SC,
    SH,
    SW,
    ON,
    OC,
    OROW,
    OCOL,
    ACTIVATION: tl.constexpr,
    WINDOW: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = act(level + Σ_t kernel[t]·x̃[p, t] + residual) for M output pixels.

    folded: taps×K kernels, then K levels, float32. Grid: pixel blocks × channel blocks.
    """
    block, k, live_k = _block(K, BLOCK_K)
    c = k // KG
    m = index(block, INT64_OFFSETS) * BLOCK_M + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
    live = m < M
    n, oh, ow = split_pixel(m, OH, OW)
    h0 = oh * WINDOW.stride_h - WINDOW.pad_h
    w0 = ow * WINDOW.stride_w - WINDOW.pad_w
    pixel = x_ptr + _offsets(n, h0, w0, c, SN, SC, SH, SW, INT64_OFFSETS)
    pivot = tl.load(pivot_ptr + c, mask=live_k, other=0.0).to(tl.float32)[None, :]
    acc = _sum(pixel, live, h0, w0, k, live_k, pivot, folded_ptr, K, H, W, SH, SW, WINDOW, INT64_OFFSETS, BLOCK_M)
    at, there = _offsets(n, oh, ow, k, ON, OC, OROW, OCOL, INT64_OFFSETS), live[:, None] & live_k[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, activated(acc, ACTIVATION).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M", "SHARE", "H", "W", "OH", "OW"])
def correlate(
    x_ptr,
    pivot_ptr,
    grad_ptr,
    kept_ptr,
    folded_ptr,
    sloped_ptr,
    partial_ptr,
    M,
    SHARE,
    C,
    K,
    KG,
    H,
    W,
    OH,
    OW,
    SN,
    SC,
    SH,
    SW,
    GN,
    GC,
    GH,
    GW,
    ACTIVATION: tl.constexpr,
    WINDOW: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ_p g[p]·x̃[p, t] for every tap, and Σ g, over SHARE output pixels a task (partial: tasks×(taps + 1)×K).

    g = grad·act'(z), which goes into sloped_ptr unless that is None. kept_ptr, of grad's strides: of a clamp its
    output; of others the residual, None for none, and folded_ptr what convolve takes, by which z is computed again.
    Grid: tasks × channel blocks.
    """
    KERNEL_W: tl.constexpr = WINDOW.kernel_w
    TAPS: tl.constexpr = WINDOW.kernel_h * WINDOW.kernel_w
    task, k, live_k = _block(K, BLOCK_K)
    c = k // KG
    start = index(task, INT64_OFFSETS) * SHARE
    stop = tl.minimum(start + SHARE, M)
    pivot = tl.load(pivot_ptr + c, mask=live_k, other=0.0).to(tl.float32)[None, :]
    accs = (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),) * (TAPS + 1)
    for first in range(start, stop, BLOCK_M):
        m = first + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
        live = m < stop
        n, oh, ow = split_pixel(m, OH, OW)
        h0 = oh * WINDOW.stride_h - WINDOW.pad_h
        w0 = ow * WINDOW.stride_w - WINDOW.pad_w
        pixel = x_ptr + _offsets(n, h0, w0, c, SN, SC, SH, SW, INT64_OFFSETS)
        at, there = _offsets(n, oh, ow, k, GN, GC, GH, GW, INT64_OFFSETS), live[:, None] & live_k[None, :]
        g = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
        if ACTIVATION == "relu" or ACTIVATION == "relu6":
            g = where_steep(g, kept_ptr, at, there, ACTIVATION)
        elif is_smooth(ACTIVATION):
            z = _sum(
                pixel, live, h0, w0, k, live_k, pivot, folded_ptr, K, H, W, SH, SW, WINDOW, INT64_OFFSETS, BLOCK_M
            )
            if kept_ptr is not None:
                z += tl.load(kept_ptr + at, mask=there, other=0.0).to(tl.float32)
            # Beyond the map z is anything: 0 times an infinite slope would be NaN.
            g = tl.where(there, g * smooth_slope(z, ACTIVATION), 0.0)
        if sloped_ptr is not None:
            tl.store(sloped_ptr + at, g.to(sloped_ptr.dtype.element_ty), mask=there)
        accs = replaced(accs, TAPS, accs[TAPS] + g)
        for t in tl.static_range(TAPS):
            down = t // KERNEL_W * WINDOW.dil_h
            right = t % KERNEL_W * WINDOW.dil_w
            inside = live & (h0 + down >= 0) & (h0 + down < H) & (w0 + right >= 0) & (w0 + right < W)
            seen = pixel + _shift(down, right, SH, SW, INT64_OFFSETS)
            x = tl.load(seen, mask=inside[:, None] & live_k[None, :], other=0.0).to(tl.float32)
            accs = replaced(accs, t, accs[t] + g * (x - pivot))
    for t in tl.static_range(TAPS + 1):
        _store_sum(partial_ptr, task, t, k, live_k, K, TAPS + 1, accs[t])


@triton.jit(do_not_specialize=["RECTS", "SHARE", "N", "H", "W", "OH", "OW"])
def input_gradient(
    x_ptr,
    pivot_ptr,
    grad_ptr,
    rects_ptr,
    folded_ptr,
    corrections_ptr,
    dx_ptr,
    RECTS,
    SHARE,
    N,
    C,
    K,
    KG,
    H,
    W,
    OH,
    OW,
    SN,
    SC,
    SH,
    SW,
    GN,
    GC,
    GH,
    GW,
    DN,
    DC,
    DH,
    DW,
    WINDOW: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    MOST_RECTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = level + Σ_t kernel[t]·g + Σ_d correction[d]·x̃[q+d] for the pixels q of a task.

    folded: taps×K; corrections: for each rectangle of rectangles.inside (2·rows − 1)·(2·columns − 1) shifts, then
    the level, ×C; float32. Grid: tasks × channel blocks.
    """
    ROWS: tl.constexpr = WINDOW.kernel_h
    COLUMNS: tl.constexpr = WINDOW.kernel_w
    WIDTH: tl.constexpr = 2 * WINDOW.kernel_w - 1
    SHIFTS: tl.constexpr = (2 * WINDOW.kernel_h - 1) * (2 * WINDOW.kernel_w - 1)
    task, c, live_c = _block(C, BLOCK_K)
    which = _rectangle_of(task, rects_ptr, RECTS, MOST_RECTS)
    rect = rects_ptr + which * FIELDS
    top, rows = tl.load(rect + 1), tl.load(rect + 2)
    left, columns = tl.load(rect + 3), tl.load(rect + 4)
    start = index(task - tl.load(rect), INT64_OFFSETS) * SHARE
    stop = tl.minimum(start + SHARE, index(rows, INT64_OFFSETS) * columns * N)
    corrections = corrections_ptr + which.to(tl.int64) * (SHIFTS + 1) * C + c
    pivot = tl.load(pivot_ptr + c, mask=live_c, other=0.0).to(tl.float32)[None, :]
    level = tl.load(corrections + SHIFTS * C, mask=live_c, other=0.0)
    for first in range(start, stop, BLOCK_M):
        i = first + index(tl.arange(0, BLOCK_M), INT64_OFFSETS)
        live = i < stop
        n, row, column = split_pixel(i, rows, columns)
        h = top + row * WINDOW.stride_h
        w = left + column * WINDOW.stride_w
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32) + level[None, :]
        pixel = x_ptr + _offsets(n, h, w, c, SN, SC, SH, SW, INT64_OFFSETS)
        for a in range(2 * ROWS - 1):
            down = (a - (ROWS - 1)) * WINDOW.dil_h
            in_row = live & (h + down >= 0) & (h + down < H)
            for b in tl.static_range(2 * COLUMNS - 1):
                right = (b - (COLUMNS - 1)) * WINDOW.dil_w
                inside = in_row & (w + right >= 0) & (w + right < W)
                x = tl.load(
                    pixel + _shift(down, right, SH, SW, INT64_OFFSETS),
                    mask=inside[:, None] & live_c[None, :],
                    other=0.0,
                )
                factor = tl.load(corrections + (a * WIDTH + b) * C, mask=live_c, other=0.0)
                acc += factor[None, :] * (x.to(tl.float32) - pivot)
        for a in range(ROWS):
            down = h + WINDOW.pad_h - a * WINDOW.dil_h
            in_row = live & (down >= 0) & (down % WINDOW.stride_h == 0)
            down = down // WINDOW.stride_h
            in_row = in_row & (down < OH)
            for b in tl.static_range(COLUMNS):
                right = w + WINDOW.pad_w - b * WINDOW.dil_w
                inside = in_row & (right >= 0) & (right % WINDOW.stride_w == 0)
                right = right // WINDOW.stride_w
                inside = (inside & (right < OW))[:, None] & live_c[None, :]
                for o in range(KG):
                    k = c * KG + o
                    own = grad_ptr + _offsets(n, down, right, k, GN, GC, GH, GW, INT64_OFFSETS)
                    g = tl.load(own, mask=inside, other=0.0)
                    weight = tl.load(folded_ptr + (a * COLUMNS + b) * K + k, mask=live_c, other=0.0)
                    acc += weight[None, :] * g.to(tl.float32)
        out = dx_ptr + _offsets(n, h, w, c, DN, DC, DH, DW, INT64_OFFSETS)
        tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=live[:, None] & live_c[None, :])
