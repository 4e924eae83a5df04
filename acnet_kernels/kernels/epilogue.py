"""What follows a batch-norm sum within its passes: the activation, and a gradient through it.

ACTIVATION is a name of ops/epilogue.py's ACTIVATIONS, '' for none, known when a kernel is compiled: none costs
nothing. csrc/bn_sum_kernels.h computes the same on the CPU.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.constexpr_function
def is_smooth(activation):
    """Whether an activation's slope is computed from what it took, and not told by what it gave."""
    return activation in ("hardswish", "silu")


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation of z (fp32); NaN stays."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = _up_to_six(z)
    elif ACTIVATION == "hardswish":
        z = z * _up_to_six(z + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)
    return z


@triton.jit
def _up_to_six(z):
    """z from 0 to 6; NaN stays."""
    return tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))


@triton.jit
def _sigmoid(z):
    """1/(1 + e^−z), by the power of two that tl.exp makes of it: with tl.exp Triton 3.8 crashes for sm_100."""
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def smooth_slope(z, ACTIVATION: tl.constexpr):
    """The slope of hardswish or silu at z."""
    if ACTIVATION == "silu":
        s = _sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    return tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 1.0, z * (1.0 / 3.0) + 0.5))


@triton.jit
def where_steep(g, kept_ptr, at, mask, ACTIVATION: tl.constexpr):
    """g at offsets `at` where relu or relu6, which gave what kept_ptr has there, is steep; else 0."""
    out = tl.load(kept_ptr + at, mask=mask, other=0.0).to(tl.float32)
    flat = out <= 0.0
    if ACTIVATION == "relu6":
        flat = flat | (out >= 6.0)
    return tl.where(flat, 0.0, g)


@triton.jit
def before_activation(g, ys, kept_ptr, means, scales, bias, at, mask, B: tl.constexpr, ACTIVATION: tl.constexpr):
    """g·act'(z) of a tile at offsets `at`, 0 where not mask: relu and relu6 are flat where what they gave says so.

    kept_ptr: of a clamp what it gave, else the residual, None for none. The others' z is the residual and bias +
    Σ_b scales[b]·(y_b − means[b]).
    """
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        g = where_steep(g, kept_ptr, at, mask, ACTIVATION)
    elif is_smooth(ACTIVATION):
        z = tl.zeros_like(g) + bias[None, :]
        for b in tl.static_range(B):
            y = tl.load(ys[b] + at, mask=mask, other=0.0).to(tl.float32)
            z += (y - means[b][None, :]) * scales[b][None, :]
        if kept_ptr is not None:
            z += tl.load(kept_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # Beyond the map z is anything: 0 times an infinite slope would be NaN.
        g = tl.where(mask, g * smooth_slope(z, ACTIVATION), 0.0)
    return g
