"""Forward: the three branches' convolutions from one reading of the input, with their batch statistics.

Implicit GEMM on channels_last maps: M = N·OH·OW pixels × K channels, reduced over C/groups·k². Three fp32
accumulators; an x tile is loaded once for every branch that its tap belongs to (taps.py).
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .bn_sum import store_moments, tile_moments
from .taps import class_size, class_tap, dot, index, split_pixel, weight_tile


@triton.jit
def _finish(acc, y_ptr, partial_ptr, branch, m, live, k, k_live, count, K, tile, TILES, STORE: tl.constexpr):
    """Stores a branch's tile and its moments. Dead rows of acc are zero: their input was masked."""
    if STORE:
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + m[:, None] * K + k[None, :], y, mask=live[:, None] & k_live[None, :])
        # Of the map as stored: what it is normalised by is then its own, however few pixels it has.
        acc = y.to(tl.float32)
    mean, m2 = tile_moments(acc, live, count)
    store_moments(partial_ptr, mean, m2, branch, k, k_live, K, tile, TILES)


@triton.jit(do_not_specialize=["M", "TILES"])
def conv_branches(
    x_ptr,
    weights,
    ys,
    partial_ptr,
    M,
    TILES,
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
    STORE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y_b = W_b * x and every tile's mean and M2.

    weights, ys: (square, hor, ver), None for an absent branch; partial: B×2×K×TILES for the B present ones in
    that order, TILES = ⌈M / BLOCK_M⌉. CG, KG: a group's channels, in and out. CHANNELS_LAST: the weights are.
    STORE = False leaves the statistics alone (the recompute variant). WIDE: offsets need 64 bits (taps.index).
    Grid: TILES × groups·⌈KG / BLOCK_K⌉, flat, channel blocks fastest: programs sharing an x tile run together.
    """
    blocks = tl.cdiv(KG, BLOCK_K)
    per_tile = (K // KG) * blocks
    tile = tl.program_id(0) // per_tile
    group = tl.program_id(0) % per_tile // blocks
    in_group = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    k_live = in_group < KG
    k = group * KG + in_group
    m = index(tile, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < M
    n, oh, ow = split_pixel(m, OH, OW)
    h0 = oh * WINDOW.stride_h - WINDOW.pad_h
    w0 = ow * WINDOW.stride_w - WINDOW.pad_w
    pixel = (n * H + h0) * W + w0  # tap (0, 0)'s
    group_ptr = x_ptr + group * CG
    sq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    hor = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    ver = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    # A class of taps at a time: on the row where kind is odd, on the column from 2 up.
    for kind in tl.static_range(4):
        if class_size(WINDOW.kernel, kind % 2 == 1, kind >= 2) > 0:
            chunks = tl.cdiv(CG, BLOCK_C)
            for i in range(class_size(WINDOW.kernel, kind % 2 == 1, kind >= 2) * chunks):
                row, col = class_tap(i // chunks, WINDOW, kind % 2 == 1, kind >= 2)
                c = (i % chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
                c_live = c < CG
                h = h0 + row * WINDOW.dil_h
                w = w0 + col * WINDOW.dil_w
                inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = (pixel + row * WINDOW.dil_h * W + col * WINDOW.dil_w) * C
                x = tl.load(group_ptr + at[:, None] + c[None, :], mask=inside[:, None] & c_live[None, :], other=0.0)
                place = (k[None, :], c[:, None], k_live[None, :], c_live[:, None])
                tap = row * WINDOW.kernel + col
                b = weight_tile(weights[0], place, tap, CG, WINDOW.kernel * WINDOW.kernel, CHANNELS_LAST)
                sq = dot(x, b, sq, PRECISION, UPCAST)
                if kind % 2 == 1 and weights[1] is not None:
                    b = weight_tile(weights[1], place, col, CG, WINDOW.kernel, CHANNELS_LAST)
                    hor = dot(x, b, hor, PRECISION, UPCAST)
                if kind >= 2 and weights[2] is not None:
                    b = weight_tile(weights[2], place, row, CG, WINDOW.kernel, CHANNELS_LAST)
                    ver = dot(x, b, ver, PRECISION, UPCAST)
    count = tl.minimum(M - tile * BLOCK_M, BLOCK_M).to(tl.float32)
    _finish(sq, ys[0], partial_ptr, 0, m, live, k, k_live, count, K, tile, TILES, STORE)
    if weights[1] is not None:
        _finish(hor, ys[1], partial_ptr, 1, m, live, k, k_live, count, K, tile, TILES, STORE)
    if weights[2] is not None:
        AFTER: tl.constexpr = 1 if weights[1] is None else 2
        _finish(ver, ys[2], partial_ptr, AFTER, m, live, k, k_live, count, K, tile, TILES, STORE)
