"""Batch norm of up to eight maps, their sum and what follows it, act(Σ_b (s_b·(y_b − μ_b) + β_b) + r), both ways.

Every map is channels_last, that is an M×K matrix with M = N·H·W. Reductions over M are written out as one partial
result a tile, with a channel's tiles adjacent, and merged by one program a channel in a fixed order: no atomics, so
results are the same bits in every run. Statistics follow Chan's rule (per-tile mean and M2): E[y²] − E[y]² cancels.
Tuples hold one entry a map.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .configs import MOST_TOGETHER
from .epilogue import activated, before_activation, is_smooth
from .taps import replaced

_MOST_TOGETHER = tl.constexpr(MOST_TOGETHER)


@triton.jit
def tile_moments(y, mask_m, count):
    """(mean, M2) down the rows of y (fp32), of which `mask_m` mark `count`; the others must be zero."""
    mean = tl.sum(y, 0) / count
    deviation = tl.where(mask_m[:, None], y - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def merge_moments(mean, m2, before, block_mean, block_m2, count):
    """(mean, M2) of `before` rows and a block of `count` more, by Chan's rule."""
    delta = block_mean - mean
    share = count / (before + count)
    return mean + delta * share, m2 + block_m2 + delta * delta * before * share


@triton.jit
def mean_of(mean_ptr, at, mask):
    """An fp64 mean as two fp32 numbers: one would round away the deviation of a map whose mean is far larger."""
    mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
    leading = mean.to(tl.float32)
    return leading, (mean - leading).to(tl.float32)


@triton.jit
def store_moments(partial_ptr, mean, m2, branch, k, mask_k, K, tile, TILES):
    """Writes one tile's moments into partial[branch, 0 and 1, k, tile] (B×2×K×TILES)."""
    row = branch * 2 * K + k
    tl.store(partial_ptr + row.to(tl.int64) * TILES + tile, mean, mask=mask_k)
    tl.store(partial_ptr + (row + K).to(tl.int64) * TILES + tile, m2, mask=mask_k)


@triton.jit(do_not_specialize=["M", "TILES", "ROWS"])
def statistics(ys, partial_ptr, M, K, TILES, ROWS, B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and M2 of ROWS rows of every map → partial (B×2×K×TILES). Grid: (TILES, channel blocks)."""
    tile = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    start = tile.to(tl.int64) * ROWS
    stop = tl.minimum(start + ROWS, M)
    for b in tl.static_range(B):
        mean = tl.zeros((BLOCK_K,), tl.float32)
        m2 = tl.zeros((BLOCK_K,), tl.float32)
        for row in range(start, stop, BLOCK_M):
            m = row + tl.arange(0, BLOCK_M).to(tl.int64)
            mask_m = m < stop
            y = tl.load(ys[b] + m[:, None] * K + k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            count = tl.minimum(stop - row, BLOCK_M).to(tl.float32)
            block_mean, block_m2 = tile_moments(y.to(tl.float32), mask_m, count)
            mean, m2 = merge_moments(mean, m2, (row - start).to(tl.float32), block_mean, block_m2, count)
        store_moments(partial_ptr, mean, m2, b, k, mask_k, K, tile, TILES)


@triton.jit(do_not_specialize=["M", "TILES", "ROWS"])
def merge_statistics(
    partial_ptr,
    gammas,
    betas,
    eps,
    mean_ptr,
    var_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    running_means,
    running_vars,
    counters,
    shifts,
    momenta,
    momenta_rest,
    M,
    K,
    TILES,
    ROWS,
    B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merges the tiles' moments (B×2×K×TILES) in a fixed order. Grid: (K, B).

    Writes mean, biased variance and rstd (fp64, B×K each), scale s_b = γ_b·rstd_b (fp32, B×K) and bias = Σ_b β_b
    (fp32, K). rstd is 0 where that is 1/0.
    Tile t covers rows t·ROWS … of M. A γ of None is 1, a β of None is 0.
    Where running_means[b] is not None, it and running_vars[b] move towards the mean, shifted by shifts[b] unless
    None, and the unbiased variance, by momenta[b] + momenta_rest[b], or where that is None by one over the batches
    that counters[b] will have counted when `apply` has counted this one.
    """
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK_T)
    row = tl.program_id(1) * K + k
    means = partial_ptr + (row + tl.program_id(1) * K).to(tl.int64) * TILES
    m2s = partial_ptr + (row + (tl.program_id(1) + 1) * K).to(tl.int64) * TILES
    # From the first tile's mean, so that one pass has the squares too; in fp64 they cancel harmlessly.
    pivot = tl.load(means).to(tl.float64)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    total = tl.zeros((BLOCK_T,), tl.float64)
    squares = tl.zeros((BLOCK_T,), tl.float64)
    for start in range(0, TILES, BLOCK_T):
        tile = start + lane
        count = tl.maximum(tl.minimum(M - tile.to(tl.int64) * ROWS, ROWS), 0).to(tl.float32)
        delta = tl.load(means + tile, mask=tile < TILES, other=0.0).to(tl.float64) - pivot
        total += count * delta
        squares += tl.load(m2s + tile, mask=tile < TILES, other=0.0) + count * delta * delta
    shift = tl.sum(total, 0) / M
    mean = pivot + shift
    var = tl.sum(squares, 0) / M - shift * shift
    var = tl.where(var < 0.0, 0.0, var)
    bias = 0.0
    for b in tl.static_range(B):
        if betas[b] is not None:
            bias += tl.load(betas[b] + k).to(tl.float32)
        if tl.program_id(1) == b:
            spread = var + eps[b]
            rstd = tl.where(spread == 0.0, 0.0, 1.0 / tl.sqrt(spread))
            scale = rstd.to(tl.float32)
            if gammas[b] is not None:
                scale *= tl.load(gammas[b] + k).to(tl.float32)
            tl.store(mean_ptr + row, mean)
            tl.store(var_ptr + row, var)
            tl.store(rstd_ptr + row, rstd)
            tl.store(scale_ptr + row, scale)
            if running_means[b] is not None:
                if momenta[b] is None:
                    factor = 1.0 / (tl.load(counters[b]) + 1).to(tl.float64)
                else:  # two fp32 numbers, as one would round it
                    factor = tl.full([], 0.0, tl.float64) + momenta[b] + momenta_rest[b]
                moved = mean
                if shifts[b] is not None:
                    moved += tl.load(shifts[b] + k).to(tl.float64)
                _move(running_means[b] + k, moved, factor)
                _move(running_vars[b] + k, var * M / (M - 1), factor)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + k, bias)


@triton.jit
def _move(running_ptr, value, factor):
    """running ← (1 − factor)·running + factor·value: a factor of 1 leaves nothing of what was before."""
    before = tl.load(running_ptr).to(tl.float64)
    tl.store(running_ptr, ((1.0 - factor) * before + factor * value).to(running_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def apply(
    ys,
    mean_ptr,
    scale_ptr,
    bias_ptr,
    counters,
    residual_ptr,
    out_ptr,
    M,
    K,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = act(Σ_b s_b·(y_b − μ_b) + bias + residual); every counter that is not None grows by one.

    Grid: (row blocks, channel blocks).
    Not s_b·y_b + shift: that cancels where |μ| ≫ σ.
    """
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for b in tl.static_range(B):
            if counters[b] is not None:
                tl.store(counters[b], tl.load(counters[b]) + 1)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    mask = (m < M)[:, None] & mask_k[None, :]
    at = m[:, None] * K + k[None, :]
    out = tl.zeros((BLOCK_M, BLOCK_K), tl.float32) + tl.load(bias_ptr + k, mask=mask_k, other=0.0)[None, :]
    for b in tl.static_range(B):
        scale = tl.load(scale_ptr + b * K + k, mask=mask_k, other=0.0)
        mean, rest = mean_of(mean_ptr, b * K + k, mask_k)
        y = tl.load(ys[b] + at, mask=mask, other=0.0).to(tl.float32)
        out += (y - mean[None, :] - rest[None, :]) * scale[None, :]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = activated(out, ACTIVATION)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.constexpr_function
def group_size(maps, first):
    """How many maps from `first` on reduce_grad reads together."""
    return min(MOST_TOGETHER, maps - first)


@triton.jit
def _means(mean_ptr, k, mask_k, K, first: tl.constexpr, COUNT: tl.constexpr):
    """Of COUNT maps from `first` on, the means as mean_of gives them: a tuple of each number."""
    mean, rest = mean_of(mean_ptr, first * K + k, mask_k)
    means, rests = (mean,), (rest,)
    for b in tl.static_range(1, COUNT):
        mean, rest = mean_of(mean_ptr, (first + b) * K + k, mask_k)
        means, rests = means + (mean,), rests + (rest,)  # noqa: RUF005
    return means, rests


@triton.jit
def _affine(rests, rstd_ptr, gammas, betas, k, mask_k, K, B: tl.constexpr, ACTIVATION: tl.constexpr):
    """(scales, bias) as before_activation takes them, of smooth activations."""
    scales, bias = rests, tl.zeros_like(rests[0])
    if is_smooth(ACTIVATION):
        for b in tl.static_range(B):
            scale = tl.load(rstd_ptr + b * K + k, mask=mask_k, other=0.0).to(tl.float32)
            if gammas[b] is not None:
                scale *= tl.load(gammas[b] + k, mask=mask_k, other=0.0).to(tl.float32)
            if betas[b] is not None:
                bias += tl.load(betas[b] + k, mask=mask_k, other=0.0).to(tl.float32)
            bias -= scale * rests[b]
            scales = replaced(scales, b, scale)
    return scales, bias


@triton.jit
def _folded(values, FOLD: tl.constexpr):
    """Sums of FOLD rows of a tile each, all of which one thread holds: no warp waits for another."""
    rows: tl.constexpr = values.shape[0] // FOLD
    return tl.sum(tl.reshape(values, (FOLD, rows, values.shape[1])), 0)


@triton.jit(do_not_specialize=["M", "TILES", "ROWS"])
def reduce_grad(
    g_ptr,
    ys,
    mean_ptr,
    rstd_ptr,
    gammas,
    betas,
    kept_ptr,
    dresidual_ptr,
    partial_ptr,
    M,
    K,
    TILES,
    ROWS,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ g' and Σ g'·(y_b − μ_b) over ROWS rows → partial ((1+B)×K×TILES), of g' = g·act'(z).

    g' itself → dresidual_ptr unless None. For kept_ptr see before_activation. A smooth activation follows
    MOST_TOGETHER maps at most, and reads rstd_ptr, gammas and betas. Grid: (TILES, channel blocks).
    """
    tile = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    start = tile.to(tl.int64) * ROWS
    stop = tl.minimum(start + ROWS, M)
    g_total = tl.zeros((BLOCK_K,), tl.float32)
    for first in tl.static_range(0, B, _MOST_TOGETHER):
        # Each group of maps reads g again.
        g_total, products = _sums(
            g_ptr, ys, mean_ptr, rstd_ptr, gammas, betas, kept_ptr, dresidual_ptr, g_total,
            start, stop, k, mask_k, K, first, group_size(B, first), ACTIVATION, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        for b in tl.static_range(group_size(B, first)):
            tl.store(partial_ptr + ((1 + first + b) * K + k).to(tl.int64) * TILES + tile, products[b], mask=mask_k)
    tl.store(partial_ptr + k.to(tl.int64) * TILES + tile, g_total, mask=mask_k)


@triton.jit
def _sums(
    g_ptr, ys, mean_ptr, rstd_ptr, gammas, betas, kept_ptr, dresidual_ptr, g_total,
    start, stop, k, mask_k, K,
    FIRST: tl.constexpr, COUNT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(Σ g', Σ g'·(y_b − μ_b) of COUNT maps from FIRST on) over rows start to stop, as reduce_grad has them.

    g_total: the former, where FIRST is not 0.
    """
    FOLD: tl.constexpr = ys[0].dtype.element_ty.primitive_bitwidth // 8
    means, rests = _means(mean_ptr, k, mask_k, K, FIRST, COUNT)
    scales, bias = _affine(rests, rstd_ptr, gammas, betas, k, mask_k, K, COUNT, ACTIVATION)
    g_sum = tl.zeros((BLOCK_M // FOLD, BLOCK_K), tl.float32)
    products = (g_sum,)
    for _ in tl.static_range(1, COUNT):
        products = products + (g_sum,)  # noqa: RUF005
    for row in range(start, stop, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (m < stop)[:, None] & mask_k[None, :]
        at = m[:, None] * K + k[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = before_activation(g, ys, kept_ptr, means, scales, bias, at, mask, COUNT, ACTIVATION)
        if dresidual_ptr is not None:
            rounded = g.to(dresidual_ptr.dtype.element_ty)
            if FIRST == 0:
                tl.store(dresidual_ptr + at, rounded, mask=mask)
            g = rounded.to(tl.float32)  # as the second pass will read it
        if FIRST == 0:
            g_sum += _folded(g, FOLD)
        for b in tl.static_range(COUNT):
            y = tl.load(ys[FIRST + b] + at, mask=mask, other=0.0).to(tl.float32)
            products = replaced(products, b, products[b] + _folded(g * (y - means[b][None, :]), FOLD))
    if FIRST == 0:
        g_total = tl.sum(g_sum, 0)
    found = (g_total,)
    for b in tl.static_range(COUNT):
        # Not kept over the loop, whose registers it would take.
        _, rest = mean_of(mean_ptr, (FIRST + b) * K + k, mask_k)
        found = found + (tl.sum(products[b], 0) - rest * g_total,)  # noqa: RUF005
    return g_total, found[1:]


@triton.jit(do_not_specialize=["M", "TILES"])
def merge_grad(
    partial_ptr,
    gammas,
    rstd_ptr,
    dgamma_ptr,
    dbeta_ptr,
    coefficient_ptr,
    M,
    K,
    TILES,
    B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merges reduce_grad's partials in a fixed order. Grid: (K, 1 + B).

    Writes dγ_b = rstd_b·Σ g(y_b − μ_b), B×K, dβ = Σ g, K, and what `apply_grad` needs, (1+2B)×K:
    ḡ = Σg/M, then s_b = γ_b·rstd_b and e_b = −s_b·rstd_b·dγ_b/M of every map.
    """
    k = tl.program_id(0)
    part = tl.program_id(1)
    lane = tl.arange(0, BLOCK_T)
    totals = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, TILES, BLOCK_T):
        tile = start + lane
        totals += tl.load(partial_ptr + (part * K + k).to(tl.int64) * TILES + tile, mask=tile < TILES, other=0.0)
    total = tl.sum(totals, 0)
    if part == 0:
        tl.store(dbeta_ptr + k, total)
        tl.store(coefficient_ptr + k, total / M)
    for b in tl.static_range(B):
        if part == 1 + b:
            rstd = tl.load(rstd_ptr + b * K + k).to(tl.float32)
            dgamma = rstd * total
            scale = rstd
            if gammas[b] is not None:
                scale *= tl.load(gammas[b] + k).to(tl.float32)
            tl.store(dgamma_ptr + b * K + k, dgamma)
            tl.store(coefficient_ptr + K + 2 * b * K + k, scale)
            tl.store(coefficient_ptr + K + (2 * b + 1) * K + k, -scale * rstd * dgamma / M)


@triton.jit(do_not_specialize=["M"])
def apply_grad(
    g_ptr,
    ys,
    dys,
    mean_ptr,
    coefficient_ptr,
    rstd_ptr,
    gammas,
    betas,
    kept_ptr,
    M,
    K,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy_b = s_b·(g' − ḡ) + e_b·(y_b − μ_b) where dys[b] is not None; it may be ys[b]. Grid as apply's.

    g' = g·act'(z), as reduce_grad has it.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    mask = (m < M)[:, None] & mask_k[None, :]
    at = m[:, None] * K + k[None, :]
    g_mean = tl.load(coefficient_ptr + k, mask=mask_k, other=0.0)
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    means, rests = _means(mean_ptr, k, mask_k, K, 0, B)
    scales, bias = _affine(rests, rstd_ptr, gammas, betas, k, mask_k, K, B, ACTIVATION)
    g = before_activation(g, ys, kept_ptr, means, scales, bias, at, mask, B, ACTIVATION) - g_mean[None, :]
    for b in tl.static_range(B):
        if dys[b] is not None:
            scale = tl.load(coefficient_ptr + K + 2 * b * K + k, mask=mask_k, other=0.0)
            y_factor = tl.load(coefficient_ptr + K + (2 * b + 1) * K + k, mask=mask_k, other=0.0)
            y = tl.load(ys[b] + at, mask=mask, other=0.0).to(tl.float32)
            dy = scale[None, :] * g + y_factor[None, :] * (y - means[b][None, :] - rests[b][None, :])
            tl.store(dys[b] + at, dy.to(dys[b].dtype.element_ty), mask=mask)
