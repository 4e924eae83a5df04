"""The small algebra between the passes of depthwise_moments.py, in float64: of a channel, for each pair of taps.

t and u number the window's taps in raster order; BRANCHES, a compile-time constant, has five numbers a
branch: row and column, rows, columns, and the step between taps, 0 for the identity. NORMED says which
branches have a batch norm of their own, TOTAL whether one follows the sum, the last: its kernel has the
branches' without one, and those with one scaled by γ·rstd. Tiles are taps × channels, or taps × taps ×
channels, with powers of two of taps. M is how many pixels the statistics are of. Formulas:
docs/depthwise.md; W is a batch norm's kernel, G and S are of x̃ = x − pivot.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl

from .rectangles import FIELDS as _FIELDS

FIELDS = tl.constexpr(_FIELDS)


# Compile-time functions of BRANCHES.
@triton.constexpr_function
def branch_count(branches):
    """Number of branches."""
    return len(branches) // 5


@triton.constexpr_function
def number(branches, branch, i):
    """A branch's first row, first column, rows, columns or step, 0 for the identity."""
    return branches[5 * branch + i]


@triton.constexpr_function
def size_of(branches, branch):
    """Number of a branch's taps."""
    return branches[5 * branch + 2] * branches[5 * branch + 3]


@triton.constexpr_function
def own_norms(normed):
    """How many branches have a batch norm of their own."""
    return sum(normed)


@triton.constexpr_function
def branch_of(normed, norm):
    """The branch whose own a batch norm is."""
    return [b for b in range(len(normed)) if normed[b]][norm]


@triton.constexpr_function
def is_through(normed, branch, norm):
    """Whether a branch's gradient is told by this batch norm: its own, or where it has none that of the sum."""
    return sum(normed[:branch]) == norm if normed[branch] else norm == sum(normed)


@triton.constexpr_function
def place_of(branches, normed, norm):
    """Where a batch norm's numbers begin among those of all."""
    own = [branches[5 * b + 2] * branches[5 * b + 3] for b in range(len(normed)) if normed[b]]
    return sum(own[:norm])


@triton.constexpr_function
def weight_of(branches, branch):
    """Which of the weights is the branch's."""
    return sum(branches[5 * b + 4] > 0 for b in range(branch))


@triton.jit(do_not_specialize=["TASKS"])
def merge(
    partial_ptr,
    rects_ptr,
    sums_ptr,
    TASKS,
    C,
    NUMBERS,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sums (rectangles×NUMBERS×C) = Σ of the partial results of each rectangle's tasks (tasks×NUMBERS×C), float64.

    rects None: all TASKS are one's. Grid: (rectangles, channel blocks).
    """
    if rects_ptr is None:
        first, tasks = 0, TASKS
    else:
        rect = rects_ptr + tl.program_id(0) * FIELDS
        first, tasks = tl.load(rect), tl.load(rect + 5)
    t = tl.arange(0, BLOCK_T)[:, None, None]
    n = tl.arange(0, BLOCK_N)[None, :, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    live = (n < NUMBERS) & (c < C)
    total = tl.zeros((BLOCK_T, BLOCK_N, BLOCK_C), tl.float64)
    for begin in range(0, tasks, BLOCK_T):
        at = ((first + begin + t).to(tl.int64) * NUMBERS + n) * C + c
        total += tl.load(partial_ptr + at, mask=(begin + t < tasks) & live, other=0.0)
    n = tl.arange(0, BLOCK_N)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    at = (tl.program_id(0).to(tl.int64) * NUMBERS + n) * C + c
    tl.store(sums_ptr + at, tl.sum(total, 0), mask=(n < NUMBERS) & (c < C))


@triton.jit
def _own_taps(t, BRANCHES: tl.constexpr, BRANCH: tl.constexpr, COLUMNS: tl.constexpr):
    """(which of the window's taps are the branch's, their numbers among its own)."""
    STEP: tl.constexpr = 1 if number(BRANCHES, BRANCH, 4) == 0 else number(BRANCHES, BRANCH, 4)
    down = t // COLUMNS - number(BRANCHES, BRANCH, 0)
    right = t % COLUMNS - number(BRANCHES, BRANCH, 1)
    own = (down >= 0) & (down < number(BRANCHES, BRANCH, 2) * STEP) & (down % STEP == 0)
    own = own & (right >= 0) & (right < number(BRANCHES, BRANCH, 3) * STEP) & (right % STEP == 0)
    return own, down // STEP * number(BRANCHES, BRANCH, 3) + right // STEP


@triton.jit
def _kernel(weights, t, k, live, BRANCHES: tl.constexpr, BRANCH: tl.constexpr, COLUMNS: tl.constexpr):
    """A branch's kernel at taps t of channels k, 0 at taps that it lacks; t and k broadcast to the tile."""
    found = tl.zeros((t + k).shape, tl.float64)
    own, i = _own_taps(t, BRANCHES, BRANCH, COLUMNS)
    if number(BRANCHES, BRANCH, 4) == 0:
        found += tl.where(own & live, 1.0, 0.0)
    else:
        at = weights[weight_of(BRANCHES, BRANCH)] + k * size_of(BRANCHES, BRANCH) + i
        found += tl.load(at, mask=own & live, other=0.0).to(tl.float64)
    return found


@triton.jit
def _without_norms(weights, t, k, live, BRANCHES: tl.constexpr, NORMED: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of the kernels of branches that have no batch norm of their own, as _kernel gives them."""
    found = tl.zeros((t + k).shape, tl.float64)
    for b in tl.static_range(branch_count(BRANCHES)):
        if not NORMED[b]:
            found += _kernel(weights, t, k, live, BRANCHES, b, COLUMNS)
    return found


@triton.jit
def _vector(values, NORM: tl.constexpr, k, live, missing):
    """γ or β of a batch norm, or what stands for it where there is none."""
    if len(values) == 0:
        return tl.zeros(k.shape, tl.float64) + missing
    return tl.load(values[NORM] + k, mask=live, other=0.0).to(tl.float64)


@triton.jit
def _covariance(
    sums_ptr, reads_ptr, c, live, RECTS, C, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr
):
    """(G − SSᵀ/M, S) of the patches, taps × taps × channels and taps × channels."""
    SIZE: tl.constexpr = ROWS * COLUMNS
    NUMBERS: tl.constexpr = COLUMNS + (ROWS - 1) * (2 * COLUMNS - 1) + 1
    t = tl.arange(0, TAPS)[:, None, None]
    u = tl.arange(0, TAPS)[None, :, None]
    low, high = tl.minimum(t, u), tl.maximum(t, u)
    down, right = high // COLUMNS - low // COLUMNS, high % COLUMNS - low % COLUMNS
    shift = tl.where(down == 0, right, COLUMNS + (down - 1) * (2 * COLUMNS - 1) + right + COLUMNS - 1)
    tap = tl.arange(0, TAPS)[:, None]
    gram = tl.zeros((TAPS, TAPS, c.shape[0]), tl.float64)
    sums = tl.zeros((TAPS, c.shape[0]), tl.float64)
    for r in range(RECTS):
        own = sums_ptr + tl.full((), r, tl.int64) * NUMBERS * C
        reads = tl.load(reads_ptr + r * SIZE + low, mask=high < SIZE, other=0) != 0
        gram += tl.load(own + shift * C + c[None, None, :], mask=reads & live[None, None, :], other=0.0)
        reads = tl.load(reads_ptr + r * SIZE + tap, mask=tap < SIZE, other=0) != 0
        sums += tl.load(own + (NUMBERS - 1) * C + c[None, :], mask=reads & live[None, :], other=0.0)
    return gram - sums[:, None, :] * sums[None, :, :] / M, sums


@triton.jit(do_not_specialize=["RECTS", "M"])
def prepare(
    sums_ptr,
    reads_ptr,
    pivot_ptr,
    weights,
    gammas,
    betas,
    eps,
    means_ptr,
    variances_ptr,
    rstds_ptr,
    patch_sums_ptr,
    centred_ptr,
    folded_ptr,
    RECTS,
    M,
    C,
    K,
    KG,
    BRANCHES: tl.constexpr,
    NORMED: tl.constexpr,
    TOTAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    FOLD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """STATISTICS: what operators keep of x, from autocorrelate's sums; FOLD: convolve's kernel and level.

    Without STATISTICS means and rstds are read, and patch_sums of nested batch norms. sums:
    rectangles×(shifts + 1)×C; means, variances, rstds: norms×K; patch_sums: C×taps; centred: K×numbers;
    folded: (taps + 1)×K. Grid: blocks of output channels.
    """
    SIZE: tl.constexpr = ROWS * COLUMNS
    OWN: tl.constexpr = own_norms(NORMED)
    NUMBERS: tl.constexpr = place_of(BRANCHES, NORMED, OWN) + (SIZE if TOTAL else 0)
    values = M.to(tl.float64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = k < K
    c = k // KG
    t = tl.arange(0, TAPS)[:, None]
    here = live[None, :]
    pivot = tl.load(pivot_ptr + c, mask=live, other=0.0)
    if STATISTICS:
        gram, sums = _covariance(sums_ptr, reads_ptr, c, live, RECTS, C, values, ROWS, COLUMNS, TAPS)
        first = (k % KG == 0)[None, :] & here & (t < SIZE)
        tl.store(patch_sums_ptr + c[None, :] * SIZE + t, sums + values * pivot[None, :], mask=first)
    whole = tl.zeros((TAPS, BLOCK), tl.float64)
    level = tl.zeros((BLOCK,), tl.float64)
    inner = tl.zeros((BLOCK,), tl.float64)  # what batch norms in the sum add to it
    u = tl.arange(0, TAPS)[None, :, None]
    of_sum = _without_norms(weights, t, k[None, :], here, BRANCHES, NORMED, COLUMNS)
    of_sum_too = _without_norms(weights, u, k[None, None, :], here[:, None, :], BRANCHES, NORMED, COLUMNS)
    for b in tl.static_range(OWN + TOTAL):
        w, other = of_sum, of_sum_too
        of_t, of_u, i = t < SIZE, u < SIZE, t + 0
        if b < OWN:
            w = _kernel(weights, t, k[None, :], here, BRANCHES, branch_of(NORMED, b), COLUMNS)
            other = _kernel(weights, u, k[None, None, :], here[:, None, :], BRANCHES, branch_of(NORMED, b), COLUMNS)
            of_t, i = _own_taps(t, BRANCHES, branch_of(NORMED, b), COLUMNS)
            of_u, _ = _own_taps(u, BRANCHES, branch_of(NORMED, b), COLUMNS)
        total = tl.sum(w, 0)
        if STATISTICS:
            centred = tl.sum(tl.where(of_u & of_t[:, :, None], gram, 0.0) * other, 1)
            mean = tl.sum(tl.where(of_t, sums, 0.0) * w, 0) / values + pivot * total
            variance = tl.sum(w * centred, 0) / values
            variance = tl.where(variance < 0, 0.0, variance)
            bound = 1e-13 * tl.sum(tl.abs(w), 0) * tl.abs(pivot)  # what rounding alone may have made, of ε = 0
            variance = tl.where((eps[b] == 0.0) & (variance <= bound * bound), 0.0, variance)
            spread = variance + eps[b]
            rstd = tl.where(spread == 0.0, 0.0, 1.0 / tl.sqrt(spread))
            tl.store(means_ptr + b * K + k, mean + inner if b == OWN else mean, mask=live)
            tl.store(variances_ptr + b * K + k, variance, mask=live)
            tl.store(rstds_ptr + b * K + k, rstd, mask=live)
            at = k[None, :] * NUMBERS + place_of(BRANCHES, NORMED, b) + i
            tl.store(centred_ptr + at, centred.to(tl.float32), mask=of_t & here)
        else:
            mean = tl.load(means_ptr + b * K + k, mask=live, other=0.0)
            rstd = tl.load(rstds_ptr + b * K + k, mask=live, other=0.0)
            if b == OWN and OWN > 0:  # but for what the batch norms in the sum add
                seen = tl.load(patch_sums_ptr + c[None, :] * SIZE + t, mask=(t < SIZE) & here, other=0.0)
                mean = tl.sum(seen * w, 0) / values
        scale = rstd * _vector(gammas, b, k, live, 1.0)
        beta = _vector(betas, b, k, live, 0.0)
        if b < OWN and TOTAL:
            of_sum += scale[None, :] * w
            of_sum_too += scale[None, None, :] * other
            inner += beta - scale * mean
        elif FOLD:
            whole += scale[None, :] * w
            level += beta - scale * (mean - pivot * total)
    if FOLD:
        tl.store(folded_ptr + t * K + k[None, :], whole.to(tl.float32), mask=(t < SIZE) & here)
        tl.store(folded_ptr + SIZE * K + k, level.to(tl.float32), mask=live)


@triton.jit(do_not_specialize=["M"])
def differentiate(
    products_ptr,
    pivot_ptr,
    weights,
    gammas,
    means_ptr,
    rstds_ptr,
    patch_sums_ptr,
    centred_ptr,
    averages_ptr,
    dws,
    dgammas_ptr,
    dbeta_ptr,
    folded_ptr,
    squares_ptr,
    M,
    C,
    K,
    KG,
    BRANCHES: tl.constexpr,
    NORMED: tl.constexpr,
    TOTAL: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of weights, γs and β from products of correlate ((taps + 1)×K); INPUT: and what dx is made of.

    The batch norm of a sum comes first: what it hands on takes the products' place, and sums to 0.
    averages, None where they are these maps' own: (norms + 1)×K. dws: one a weight, None where it is not
    wanted; dgammas: norms×K or None. folded: taps×K; squares: per tap and pair of taps Σ_b
    slope_b·W_b[t]·W_b[u] (taps·taps×C), then Σ_b shift_b·W_b[t] (taps×C). Grid: blocks of input channels.
    """
    SIZE: tl.constexpr = ROWS * COLUMNS
    OWN: tl.constexpr = own_norms(NORMED)
    NORMS: tl.constexpr = OWN + TOTAL
    NUMBERS: tl.constexpr = place_of(BRANCHES, NORMED, OWN) + (SIZE if TOTAL else 0)
    values = M.to(tl.float64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    t = tl.arange(0, TAPS)[:, None]
    there = (t < SIZE) & live[None, :]
    pivot = tl.load(pivot_ptr + c, mask=live, other=0.0)
    patch_sums = tl.load(patch_sums_ptr + c[None, :] * SIZE + t, mask=there, other=0.0)
    squares = tl.zeros((TAPS, TAPS, BLOCK), tl.float64)
    levels = tl.zeros((TAPS, BLOCK), tl.float64)
    for j in range(KG):
        k = c * KG + j
        products = tl.load(products_ptr + t * K + k[None, :], mask=there, other=0.0)
        total = tl.load(products_ptr + SIZE * K + k, mask=live, other=0.0)
        products += (pivot * total)[None, :]
        tl.store(dbeta_ptr + k, total.to(tl.float32), mask=live)
        offset = total / values
        if averages_ptr is not None:
            offset = tl.load(averages_ptr + NORMS * K + k, mask=live, other=0.0)
        whole = tl.zeros((TAPS, BLOCK), tl.float64)
        u = tl.arange(0, TAPS)[None, :, None]
        there_too = live[None, None, :]
        of_sum = _without_norms(weights, t, k[None, :], live[None, :], BRANCHES, NORMED, COLUMNS)
        of_sum_too = _without_norms(weights, u, k[None, None, :], there_too, BRANCHES, NORMED, COLUMNS)
        if TOTAL:
            for b in tl.static_range(OWN):
                scale = tl.load(rstds_ptr + b * K + k, mask=live, other=0.0) * _vector(gammas, b, k, live, 1.0)
                w = _kernel(weights, t, k[None, :], live[None, :], BRANCHES, branch_of(NORMED, b), COLUMNS)
                of_sum += scale[None, :] * w
                w = _kernel(weights, u, k[None, None, :], there_too, BRANCHES, branch_of(NORMED, b), COLUMNS)
                of_sum_too += scale[None, None, :] * w
        for b in tl.static_range(NORMS - 1, -1, -1):
            w, other = of_sum, of_sum_too
            mean = tl.load(means_ptr + b * K + k, mask=live, other=0.0)
            if b < OWN:
                w = _kernel(weights, t, k[None, :], live[None, :], BRANCHES, branch_of(NORMED, b), COLUMNS)
                other = _kernel(weights, u, k[None, None, :], there_too, BRANCHES, branch_of(NORMED, b), COLUMNS)
            elif OWN > 0:  # but for what the batch norms in the sum add
                mean = tl.sum(w * patch_sums, 0) / values
            rstd = tl.load(rstds_ptr + b * K + k, mask=live, other=0.0)
            dgamma = rstd * (tl.sum(w * products, 0) - mean * total)
            if dgammas_ptr is not None:
                tl.store(dgammas_ptr + b * K + k, dgamma.to(tl.float32), mask=live)
            projection = dgamma / values
            if averages_ptr is not None:
                projection = tl.load(averages_ptr + b * K + k, mask=live, other=0.0)
            scale = rstd * _vector(gammas, b, k, live, 1.0)
            factor = projection * rstd
            for n in tl.static_range(branch_count(BRANCHES)):
                if is_through(NORMED, n, b) and number(BRANCHES, n, 4) != 0:  # noqa: SIM102
                    if dws[weight_of(BRANCHES, n)] is not None:  # the identity has none
                        own, i = _own_taps(t, BRANCHES, n, COLUMNS)
                        own = own & live[None, :]
                        place = i if b < OWN else t
                        at = centred_ptr + k[None, :] * NUMBERS + place_of(BRANCHES, NORMED, b) + place
                        centred = tl.load(at, mask=own, other=0.0).to(tl.float64)
                        d = products - offset[None, :] * patch_sums - factor[None, :] * centred
                        dw = dws[weight_of(BRANCHES, n)]
                        at = dw + k[None, :] * size_of(BRANCHES, n) + i
                        tl.store(at, (scale[None, :] * d).to(tl.float32).to(dw.dtype.element_ty), mask=own)
            if INPUT:
                squares += w[:, None, :] * (other * (scale * factor)[None, None, :])
                shift = scale * (factor * (mean - pivot * tl.sum(w, 0)) - offset)
                levels += shift[None, :] * w
                if b == OWN or not TOTAL:
                    whole += scale[None, :] * w
            if b == OWN and OWN > 0:
                at = centred_ptr + k[None, :] * NUMBERS + place_of(BRANCHES, NORMED, OWN) + t
                centred = tl.load(at, mask=there, other=0.0).to(tl.float64)
                products = scale[None, :] * (products - offset[None, :] * patch_sums - factor[None, :] * centred)
                total, offset = total * 0.0, offset * 0.0
        if INPUT:
            tl.store(folded_ptr + t * K + k[None, :], whole.to(tl.float32), mask=there)
    if INPUT:
        tl.store(squares_ptr + (SIZE * SIZE + t) * C + c[None, :], levels, mask=there)
        t = tl.arange(0, TAPS)[:, None, None]
        u = tl.arange(0, TAPS)[None, :, None]
        pairs = squares_ptr + (t * SIZE + u) * C + c[None, None, :]
        tl.store(pairs, squares, mask=(t < SIZE) & (u < SIZE) & live[None, None, :])


@triton.jit
def correct(
    squares_ptr,
    reads_ptr,
    corrections_ptr,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What input_gradient takes for a rectangle: for every shift d −Σ_t squares[t, t + d] over the taps that read
    it, and their levels. SHIFTS: a power of two that holds them. Grid: (rectangles, channel blocks).
    """
    SIZE: tl.constexpr = ROWS * COLUMNS
    WIDTH: tl.constexpr = 2 * COLUMNS - 1
    COUNT: tl.constexpr = (2 * ROWS - 1) * WIDTH
    r = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    d = tl.arange(0, SHIFTS)[:, None]
    down, right = d // WIDTH - (ROWS - 1), d % WIDTH - (COLUMNS - 1)
    total = tl.zeros((SHIFTS, BLOCK), tl.float64)
    level = tl.zeros((BLOCK,), tl.float64)
    for t in range(SIZE):
        reads = tl.load(reads_ptr + r * SIZE + t) != 0
        row, column = t // COLUMNS + down, t % COLUMNS + right
        other = (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS) & (d < COUNT)
        at = squares_ptr + (t * SIZE + row * COLUMNS + column) * C + c[None, :]
        total += tl.load(at, mask=reads & other & live[None, :], other=0.0)
        level += tl.load(squares_ptr + (SIZE * SIZE + t) * C + c, mask=reads & live, other=0.0)
    own = corrections_ptr + r.to(tl.int64) * (COUNT + 1) * C
    tl.store(own + d * C + c[None, :], (-total).to(tl.float32), mask=(d < COUNT) & live[None, :])
    tl.store(own + COUNT * C + c, level.to(tl.float32), mask=live)
