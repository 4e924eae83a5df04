"""Weights as TF32's products take them."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .taps import branch_count, size_of, weight_block, weight_tile


@triton.jit
def _nearest(w):
    """Numbers to the nearest of 10 bits of mantissa; inf and NaN stay."""
    nearest = (w.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(w) < float("inf"), nearest.to(tl.float32, bitcast=True), w)


@triton.jit
def round_to_tf32(
    weights,
    rounded,
    CG,
    KG,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    REDUCE_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rounded[b] = weights[b] to TF32, what a product sums over adjacent in memory.

    weights: as conv_branches takes them. rounded: K×taps×C/groups, or with REDUCE_K C×taps×K/groups. Tensor cores
    would cut the bits off, always towards zero, and take TF32's tiles from shared memory in this order alone: any
    other is copied there 4 bytes at a time. Grid: (groups·⌈KG / BLOCK⌉·⌈CG / BLOCK⌉, most taps, branches).
    """
    group, in_group, c = weight_block(tl.program_id(0), KG, CG, BLOCK, BLOCK)
    tap = tl.program_id(1)
    k = group * KG + in_group
    place = (k[:, None], c[None, :], (in_group < KG)[:, None], (c < CG)[None, :])
    for b in tl.static_range(branch_count(WINDOW)):
        if tl.program_id(2) == b and tap < size_of(WINDOW, b):
            w = _nearest(weight_tile(weights[b], place, tap, CG, size_of(WINDOW, b), CHANNELS_LAST))
            if REDUCE_K:
                at = ((group * CG + c)[None, :] * size_of(WINDOW, b) + tap) * KG + in_group[:, None]
            else:
                at = (k[:, None] * size_of(WINDOW, b) + tap) * CG + c[None, :]
            tl.store(rounded[b] + at, w, mask=(in_group < KG)[:, None] & (c < CG)[None, :])
