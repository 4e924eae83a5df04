"""The input's gradient: one accumulator over the taps of all three branches' dy.

Implicit GEMM: input pixels × C channels, reduced over K/groups·(k² + 2k). With a stride, pixels of one residue
(row mod stride, column mod stride), a phase, meet the same taps; a program's pixels are all of one phase, so no
product is computed only to be masked.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import math

import triton
import triton.language as tl

from .taps import dot, index, split_pixel, weight_tile


@triton.constexpr_function
def tap_step(stride, dilation):
    """Distance between two taps that the same phase meets."""
    return stride // math.gcd(stride, dilation)


@triton.jit
def _first_tap(at, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr):
    """Smallest tap r with at − r·DIL a multiple of STRIDE; KERNEL if there is none."""
    first = at * 0 + KERNEL
    for i in tl.static_range(KERNEL):
        first = tl.where((at - (KERNEL - 1 - i) * DIL) % STRIDE == 0, KERNEL - 1 - i, first)
    return first


@triton.jit(do_not_specialize=["N", "TILES"])
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
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = Σ_b the transposed convolution of dy_b with W_b.

    Arguments as conv_branches takes them; dys in the place of ys. TILES: row blocks of the largest phase,
    ⌈N·⌈H/stride_h⌉·⌈W/stride_w⌉ / BLOCK_M⌉. Grid: stride_h·stride_w × TILES × groups·⌈CG / BLOCK_C⌉, flat, channel
    blocks fastest.
    """
    blocks = tl.cdiv(CG, BLOCK_C)
    per_tile = (C // CG) * blocks
    rest = tl.program_id(0) // per_tile
    group = tl.program_id(0) % per_tile // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = c < CG
    phase = rest // TILES
    phase_h = phase // WINDOW.stride_w
    phase_w = phase % WINDOW.stride_w
    # Rows and columns of this phase; none where the map is smaller than the stride.
    rows = tl.cdiv(H - phase_h, WINDOW.stride_h)
    cols = tl.cdiv(W - phase_w, WINDOW.stride_w)
    m = index(rest % TILES, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, h, w = split_pixel(m, tl.maximum(rows, 1), tl.maximum(cols, 1))
    live = (n < N) & (rows > 0) & (cols > 0)
    pixel = (n * OH + h) * OW + w

    at_h = phase_h + WINDOW.pad_h
    at_w = phase_w + WINDOW.pad_w
    row0 = _first_tap(at_h, WINDOW.kernel, WINDOW.stride_h, WINDOW.dil_h)
    col0 = _first_tap(at_w, WINDOW.kernel, WINDOW.stride_w, WINDOW.dil_w)
    row_taps = tl.cdiv(WINDOW.kernel - row0, tap_step(WINDOW.stride_h, WINDOW.dil_h))
    col_taps = tl.cdiv(WINDOW.kernel - col0, tap_step(WINDOW.stride_w, WINDOW.dil_w))
    on_row = ((at_h - WINDOW.hor_row * WINDOW.dil_h) % WINDOW.stride_h == 0).to(tl.int32)
    on_col = ((at_w - WINDOW.ver_col * WINDOW.dil_w) % WINDOW.stride_w == 0).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    chunks = tl.cdiv(KG, BLOCK_K)
    for b in tl.static_range(3):
        if weights[b] is not None:
            # hor has one row of taps, ver one column, if this phase meets it.
            first_row = WINDOW.hor_row if b == 1 else row0
            first_col = WINDOW.ver_col if b == 2 else col0
            down_taps = on_row if b == 1 else row_taps
            across_taps = on_col if b == 2 else col_taps
            for i in range(down_taps * across_taps * chunks):
                row = first_row + i // chunks // across_taps * tap_step(WINDOW.stride_h, WINDOW.dil_h)
                col = first_col + i // chunks % across_taps * tap_step(WINDOW.stride_w, WINDOW.dil_w)
                k = i % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
                k_live = k < KG
                # Exact divisions: the phase meets these taps.
                down = (at_h - row * WINDOW.dil_h) // WINDOW.stride_h
                right = (at_w - col * WINDOW.dil_w) // WINDOW.stride_w
                inside = live & (h + down >= 0) & (h + down < OH) & (w + right >= 0) & (w + right < OW)
                at = (pixel + down * OW + right) * K + group * KG
                dy = tl.load(dys[b] + at[:, None] + k[None, :], mask=inside[:, None] & k_live[None, :], other=0.0)
                weight = weight_tile(
                    weights[b],
                    ((group * KG + k)[:, None], c[None, :], k_live[:, None], c_live[None, :]),
                    WINDOW.kernel * row + col if b == 0 else (col if b == 1 else row),
                    CG,
                    WINDOW.kernel * WINDOW.kernel if b == 0 else WINDOW.kernel,
                    CHANNELS_LAST,
                )
                acc = dot(dy, weight, acc, PRECISION, UPCAST)
    out = ((n * H + h * WINDOW.stride_h + phase_h) * W + w * WINDOW.stride_w + phase_w) * C + group * CG
    tl.store(
        dx_ptr + out[:, None] + c[None, :], acc.to(dx_ptr.dtype.element_ty), mask=live[:, None] & c_live[None, :]
    )
