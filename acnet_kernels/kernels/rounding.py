"""Weights as TF32's products take them."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(weights, rounded, sizes, BLOCK: tl.constexpr):
    """rounded[b] = weights[b], of sizes[b] numbers, to the nearest of 10 bits of mantissa; inf and NaN stay.

    Tensor cores would cut the other bits off, always towards zero. Grid: (most blocks, tensors).
    """
    TENSORS: tl.constexpr = len(weights)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for b in tl.static_range(TENSORS):
        if tl.program_id(1) == b:
            mask = at < sizes[b]
            w = tl.load(weights[b] + at, mask=mask, other=0.0)
            nearest = (w.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            w = tl.where(tl.abs(w) < float("inf"), nearest.to(tl.float32, bitcast=True), w)
            tl.store(rounded[b] + at, w, mask=mask)
