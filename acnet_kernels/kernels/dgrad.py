"""The input's gradient: one accumulator over the taps of every branch's dy.

Implicit GEMM: input pixels × C channels, reduced over K/groups·(taps of all branches). With a stride, pixels of one
residue (row mod stride, column mod stride), a phase, meet the same taps; a program's pixels are all of one phase,
so no product is computed only to be masked.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import math

import triton
import triton.language as tl

from .taps import branch_count, dot, index, multiple, size_of, split_pixel, weight_tile


@triton.constexpr_function
def dilation(window, branch, axis):
    """Distance between two of the branch's own taps along an axis (0: rows), in pixels of the input."""
    return window[6 + axis] * window[-1][branch][4]


@triton.constexpr_function
def steps(window, branch, axis):
    """(the branch's taps, pixels of dy) between two taps that the same phase meets."""
    common = math.gcd(window[2 + axis], dilation(window, branch, axis))
    return window[2 + axis] // common, dilation(window, branch, axis) // common


@triton.jit
def _met(phase, WINDOW: tl.constexpr, BRANCH: tl.constexpr, AXIS: tl.constexpr):
    """(first, number) of the branch's own taps on an axis that the phase meets, and the first's pixel of dy."""
    TAPS: tl.constexpr = WINDOW.branches[BRANCH][2 + AXIS]
    STRIDE: tl.constexpr = WINDOW[2 + AXIS]
    DIL: tl.constexpr = dilation(WINDOW, BRANCH, AXIS)
    at = phase + WINDOW[4 + AXIS] - WINDOW.branches[BRANCH][AXIS] * WINDOW[6 + AXIS]
    first = at * 0 + TAPS
    for i in tl.static_range(TAPS):
        first = tl.where((at - (TAPS - 1 - i) * DIL) % STRIDE == 0, TAPS - 1 - i, first)
    return first, tl.cdiv(TAPS - first, steps(WINDOW, BRANCH, AXIS)[0]), (at - first * DIL) // STRIDE


@triton.jit(do_not_specialize=["N", "TILES", "H", "W", "OH", "OW"])
def conv_dgrad(
    dys,
    weights,
    dx_ptr,
    N,
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
    REDUCE_K: tl.constexpr,
    VECTOR_C: tl.constexpr,
    VECTOR_K: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETER_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = Σ_b the transposed convolution of dy_b with W_b.

    Arguments as conv_branches takes them; dys in the place of ys. REDUCE_K: the weights are as round_to_tf32 writes
    them, output channels adjacent. TILES: row blocks of the largest phase,
    ⌈N·⌈H/stride_h⌉·⌈W/stride_w⌉ / BLOCK_M⌉. Grid: stride_h·stride_w × TILES × groups·⌈CG / BLOCK_C⌉, flat, channel
    blocks fastest.
    """
    C, CG = multiple(C, VECTOR_C), multiple(CG, VECTOR_C)
    K, KG = multiple(K, VECTOR_K), multiple(KG, VECTOR_K)
    blocks = tl.cdiv(CG, BLOCK_C)
    per_tile = (C // CG) * blocks
    rest = tl.program_id(0) // per_tile
    group = tl.program_id(0) % per_tile // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < CG
    phase = rest // TILES
    phase_h = phase // WINDOW.stride_w
    phase_w = phase % WINDOW.stride_w
    # Rows and columns of this phase; none where the map is smaller than the stride.
    phase_rows = tl.cdiv(H - phase_h, WINDOW.stride_h)
    phase_cols = tl.cdiv(W - phase_w, WINDOW.stride_w)
    m = index(rest % TILES, INT64_OFFSETS) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, h, w = split_pixel(m, tl.maximum(phase_rows, 1), tl.maximum(phase_cols, 1))
    mask_m = (n < N) & (phase_rows > 0) & (phase_cols > 0)
    pixel = (n * OH + h) * OW + w

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    chunks = tl.cdiv(KG, BLOCK_K)
    for b in tl.static_range(branch_count(WINDOW)):
        row0, rows, down0 = _met(phase_h, WINDOW, b, 0)
        col0, cols, right0 = _met(phase_w, WINDOW, b, 1)
        for i in range(rows * cols * chunks):
            i_h = i // chunks // cols
            i_w = i // chunks % cols
            row = row0 + i_h * steps(WINDOW, b, 0)[0]
            col = col0 + i_w * steps(WINDOW, b, 1)[0]
            down = down0 - i_h * steps(WINDOW, b, 0)[1]
            right = right0 - i_w * steps(WINDOW, b, 1)[1]
            k = i % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
            mask_k = k < KG
            inside = mask_m & (h + down >= 0) & (h + down < OH) & (w + right >= 0) & (w + right < OW)
            at = (pixel + down * OW + right) * K + group * KG
            dy = tl.load(dys[b] + at[:, None] + k[None, :], mask=inside[:, None] & mask_k[None, :], other=0.0)
            tap = row * WINDOW.branches[b].columns + col
            if REDUCE_K:
                place = ((group * CG + c)[None, :], k[:, None], mask_c[None, :], mask_k[:, None])
                weight = weight_tile(weights[b], place, tap, KG, size_of(WINDOW, b), True)
            else:
                place = ((group * KG + k)[:, None], c[None, :], mask_k[:, None], mask_c[None, :])
                weight = weight_tile(weights[b], place, tap, CG, size_of(WINDOW, b), CHANNELS_LAST)
            acc = dot(dy, weight, acc, PRECISION, INTERPRETER_FP32)
    out = ((n * H + h * WINDOW.stride_h + phase_h) * W + w * WINDOW.stride_w + phase_w) * C + group * CG
    tl.store(
        dx_ptr + out[:, None] + c[None, :], acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :]
    )
