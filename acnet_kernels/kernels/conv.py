"""Forward: all branches' convolutions from one reading of the input, with their batch statistics.

Implicit GEMM on channels_last maps: M = N·OH·OW pixels × K channels, reduced over C/groups·taps. One fp32
accumulator a branch; an x tile is loaded once for every branch that wants its tap (taps.py).
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .bn_sum import store_moments, tile_moments
from .taps import (
    branch_count,
    dot,
    index,
    multiple,
    replaced,
    size_of,
    split_pixel,
    tap_at,
    tap_count,
    tap_number,
    weight_tile,
)


@triton.jit(do_not_specialize=["M", "TILES", "H", "W", "OH", "OW"])
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
    VECTOR_C: tl.constexpr,
    VECTOR_K: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETER_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y_b = W_b * x and every tile's mean and M2.

    weights, ys: one entry for each of the window's B branches; partial: B×2×K×TILES, TILES = ⌈M / BLOCK_M⌉. CG, KG:
    a group's channels, in and out. CHANNELS_LAST: the weights are.
    VECTOR_C, VECTOR_K: C, CG and K, KG are multiples of these, where not of 16, which Triton sees.
    STORE = False leaves the statistics alone (the recompute variant). INT64_OFFSETS: see taps.index.
    Grid: TILES × groups·⌈KG / BLOCK_K⌉, flat, channel blocks fastest: programs sharing an x tile run together.
    """
    C, CG = multiple(C, VECTOR_C), multiple(CG, VECTOR_C)
    K, KG = multiple(K, VECTOR_K), multiple(KG, VECTOR_K)
    BRANCHES: tl.constexpr = branch_count(WINDOW)
    blocks = tl.cdiv(KG, BLOCK_K)
    per_tile = (K // KG) * blocks
    tile = tl.program_id(0) // per_tile
    group = tl.program_id(0) % per_tile // blocks
    in_group = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = in_group < KG
    k = group * KG + in_group
    m = index(tile, INT64_OFFSETS) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < M
    n, oh, ow = split_pixel(m, OH, OW)
    h0 = oh * WINDOW.stride_h - WINDOW.pad_h
    w0 = ow * WINDOW.stride_w - WINDOW.pad_w
    pixel = (n * H + h0) * W + w0  # tap (0, 0)'s
    group_ptr = x_ptr + group * CG
    zeros = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    accs = (zeros, zeros, zeros)
    for mask in tl.static_range(1, 2**BRANCHES):
        if tap_count(WINDOW, mask) > 0:
            chunks = tl.cdiv(CG, BLOCK_C)
            for i in range(tap_count(WINDOW, mask) * chunks):
                row, col = tap_at(i // chunks, WINDOW, mask)
                c = (i % chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
                mask_c = c < CG
                h = h0 + row * WINDOW.dil_h
                w = w0 + col * WINDOW.dil_w
                inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = (pixel + row * WINDOW.dil_h * W + col * WINDOW.dil_w) * C
                x = tl.load(group_ptr + at[:, None] + c[None, :], mask=inside[:, None] & mask_c[None, :], other=0.0)
                place = (k[None, :], c[:, None], mask_k[None, :], mask_c[:, None])
                for b in tl.static_range(BRANCHES):
                    if mask >> b & 1:
                        tap = tap_number(row, col, WINDOW, b)
                        weight = weight_tile(weights[b], place, tap, CG, size_of(WINDOW, b), CHANNELS_LAST)
                        accs = replaced(accs, b, dot(x, weight, accs[b], PRECISION, INTERPRETER_FP32))
    count = tl.minimum(M - tile * BLOCK_M, BLOCK_M).to(tl.float32)
    for b in tl.static_range(BRANCHES):
        y = accs[b]  # zero in masked rows, as their input is
        if STORE:
            stored = y.to(ys[b].dtype.element_ty)
            tl.store(ys[b] + m[:, None] * K + k[None, :], stored, mask=mask_m[:, None] & mask_k[None, :])
            # The moments are the stored map's: what it is normalised by is then its own, however few pixels it has.
            y = stored.to(tl.float32)
        mean, m2 = tile_moments(y, mask_m, count)
        store_moments(partial_ptr, mean, m2, b, k, mask_k, K, tile, TILES)
