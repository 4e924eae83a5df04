"""A valid random call of every operator, and what it must return, from the definitions in float64."""

from __future__ import annotations

import importlib
import math
import pkgutil
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import acnet_kernels
from acnet_kernels import reference
from acnet_kernels.block import taps_of
from acnet_kernels.geometry import Geometry, Taps
from acnet_kernels.kernels.window import Window
from acnet_kernels.ops import fuse_blocks as fusing
from acnet_kernels.ops.epilogue import ACTIVATIONS as EPILOGUES
from acnet_kernels.ops.epilogue import activate, is_clamp
from acnet_kernels.ops.fusion import append_branches
from acnet_kernels.steps import depthwise_plain, packed

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def operators() -> list[str]:
    """Every registered operator's name, once all modules that register one are imported."""
    for module in pkgutil.walk_packages(acnet_kernels.__path__, "acnet_kernels."):
        if module.name.startswith(("acnet_kernels.ops.", "acnet_kernels.steps.")):
            importlib.import_module(module.name)
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("acnet_kernels::"))
    return sorted(name.split("::")[1] for name in names)


class Case(NamedTuple):
    """make(random) gives valid arguments; results(*args) what the call returns, with None for what is not checked.

    An operator that writes has the contents of the arguments it writes first among its results, in the schema's
    order. `device` is where it can be called here.
    """

    make: Callable[[random.Random], list[Any]]
    results: Callable[..., list[Any]]
    device: str = "cpu"


def wide(t: Tensor) -> Tensor:
    return t.double()


def per_channel(t: Tensor) -> Tensor:
    return wide(t)[:, None, None]


def layout_of(r: random.Random, t: Tensor) -> Tensor:
    return t.contiguous(memory_format=r.choice([torch.contiguous_format, torch.channels_last]))


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def maps_of(r: random.Random, count: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (r.randint(1, 3), r.randint(1, 6), r.randint(1, 6), r.randint(2, 6))
    layout = r.choice([torch.contiguous_format, torch.channels_last])
    return [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(count)]


# ---- bn_sum, and what follows it ----


def bn_sum_forward(r: random.Random) -> list[Any]:
    dtype = r.choice(FLOATS)
    ys = maps_of(r, r.choice([1, 2, 3, 8]), dtype)
    k = ys[0].shape[1]
    gammas, betas = ([torch.randn(k) for _ in ys] if r.random() < 0.7 else [] for _ in range(2))
    out = r.choice([None, torch.float16]) if dtype == torch.float32 else None
    return [ys, gammas, betas, [r.choice([1e-5, 1e-4, 1e-3]) for _ in ys], out]


def bn_sum_forward_results(ys: Any, gammas: Any, betas: Any, eps: Any, dtype: Any) -> list[Any]:
    means = torch.stack([wide(y).mean((0, 2, 3)) for y in ys])
    variances = torch.stack([wide(y).var((0, 2, 3), correction=0) for y in ys])
    rstds = (variances + torch.tensor(eps, dtype=torch.float64)[:, None]).rsqrt()
    out = torch.zeros(ys[0].shape, dtype=torch.float64)
    for b, y in enumerate(ys):
        normed = (wide(y) - per_channel(means[b])) * per_channel(rstds[b])
        out += normed * (per_channel(gammas[b]) if gammas else 1) + (per_channel(betas[b]) if betas else 0)
    return [out, means, variances, rstds]


def bn_sum_affine(r: random.Random) -> list[Any]:
    return bn_sum_forward(r)[:-1]


def bn_sum_affine_results(ys: Any, gammas: Any, betas: Any, eps: Any) -> list[Any]:
    _, means, variances, rstds = bn_sum_forward_results(ys, [], [], eps, None)
    centres = means.to(sums_dtype(ys[0].dtype))  # rounded, which the shift makes up for
    scales = rstds * torch.stack([wide(gamma) for gamma in gammas]) if gammas else rstds
    shift = (scales * (wide(centres) - means)).sum(0) + sum(wide(beta) for beta in betas)
    return [means, variances, rstds, centres, scales, shift]


def bn_sum_backward(r: random.Random) -> list[Any]:
    ys, gammas, _, eps, out = bn_sum_forward(r)
    _, means, _, rstds = bn_sum_forward_results(ys, gammas, [], eps, None)
    grad = torch.randn_like(ys[0]).to(ys[0].dtype if out is None else out)
    return [grad, ys, means, rstds, gammas, [r.random() < 0.7 for _ in ys]]


def bn_sum_slopes(r: random.Random) -> list[Any]:
    return bn_sum_backward(r)[:-1]


def bn_sum_slopes_results(grad: Any, ys: Any, means: Any, rstds: Any, gammas: Any) -> list[Any]:
    _, dgammas, dbeta = bn_sum_backward_results(grad, ys, means, rstds, gammas, [False] * len(ys))
    count, left = grad.numel() / grad.shape[1], means - wide(means.to(sums_dtype(ys[0].dtype)))
    scales = rstds * torch.stack([wide(gamma) for gamma in gammas]) if gammas else rstds
    factors = -scales * rstds * dgammas / count
    return [dgammas, dbeta, scales, factors, -scales * dbeta / count - factors * left]


def bn_sum_backward_(r: random.Random) -> list[Any]:
    grad, ys, means, rstds, gammas, needs_dy = bn_sum_backward(r)
    dys = [y if r.random() < 0.6 else torch.empty_like(y) for y, need in zip(ys, needs_dy, strict=True) if need]
    return [grad, ys, means, rstds, gammas, needs_dy, dys]


def bn_sum_epilogue_forward(r: random.Random) -> list[Any]:
    ys, gammas, betas, eps, dtype = bn_sum_forward(r)
    residual = torch.randn_like(ys[0]).to(ys[0].dtype if dtype is None else dtype) if r.random() < 0.6 else None
    return [ys, gammas, betas, eps, dtype, residual, r.randint(0, 4)]


def bn_sum_epilogue_forward_results(
    ys: Any, gammas: Any, betas: Any, eps: Any, dtype: Any, residual: Any, activation: int
) -> list[Any]:
    z, *statistics = bn_sum_forward_results(ys, gammas, betas, eps, dtype)
    z = z if residual is None else z + wide(residual)
    return [reference.ACTIVATIONS[EPILOGUES[activation]](z) if activation else z, *statistics]


def bn_sum_epilogue_backward_(r: random.Random) -> list[Any]:
    ys, gammas, betas, eps, dtype, residual, _ = bn_sum_epilogue_forward(r)
    activation = r.randint(1, 4)
    out, means, _, rstds = bn_sum_epilogue_forward_results(ys, gammas, betas, eps, dtype, residual, activation)
    kept = torch.empty_like(ys[0], dtype=dtype).copy_(out) if activation < 3 else residual
    grad = torch.randn_like(ys[0]).to(ys[0].dtype if dtype is None else dtype)
    needs_dy = [r.random() < 0.7 for _ in ys]
    dys = [y if r.random() < 0.6 else torch.empty_like(y) for y, need in zip(ys, needs_dy, strict=True) if need]
    dresidual = torch.empty_like(grad) if r.random() < 0.6 else None
    return [grad, ys, means, rstds, gammas, betas, needs_dy, kept, activation, dys, dresidual]


def bn_sum_epilogue_write_results(
    grad: Any,
    ys: Any,
    means: Any,
    rstds: Any,
    gammas: Any,
    betas: Any,
    needs_dy: Any,
    kept: Any,
    activation: int,
    dys: Any,
    dresidual: Any,
) -> list[Any]:
    if activation < 3:
        g = wide(grad) * ((kept > 0) & (kept < (6 if activation == 2 else math.inf)))
    else:
        z = torch.zeros(grad.shape, dtype=torch.float64) if kept is None else wide(kept)
        for b, y in enumerate(ys):
            normed = (wide(y) - per_channel(means[b])) * per_channel(rstds[b])
            z = z + normed * (per_channel(gammas[b]) if gammas else 1) + (per_channel(betas[b]) if betas else 0)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (g,) = torch.autograd.grad(reference.ACTIVATIONS[EPILOGUES[activation]](z), z, wide(grad))
    dys, dgammas, dbeta = norm_gradients(g, ys, means, rstds, gammas)
    wanted = [dy for dy, need in zip(dys, needs_dy, strict=True) if need]
    return [wanted, None if dresidual is None else g, dgammas, dbeta]


def norm_gradients(
    grad: Tensor, ys: Any, means: Tensor, rstds: Tensor, gammas: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(every dy, dγ B×K, dβ)."""
    g, count = wide(grad), grad.numel() / grad.shape[1]
    dbeta, dys, dgammas = g.sum((0, 2, 3)), [], []
    for b, y in enumerate(ys):
        normed = (wide(y) - per_channel(means[b])) * per_channel(rstds[b])
        dgamma = (g * normed).sum((0, 2, 3))
        scale = per_channel(rstds[b]) * (per_channel(gammas[b]) if gammas else 1)
        dys.append(scale * (g - per_channel(dbeta / count) - normed * per_channel(dgamma / count)))
        dgammas.append(dgamma)
    return dys, torch.stack(dgammas), dbeta


def bn_sum_backward_results(grad: Any, ys: Any, means: Any, rstds: Any, gammas: Any, needs_dy: Any) -> list[Any]:
    dys, dgammas, dbeta = norm_gradients(grad, ys, means, rstds, gammas)
    return [[dy for dy, need in zip(dys, needs_dy, strict=True) if need], dgammas, dbeta]


def bn_sum_write_results(*args: Any) -> list[Any]:
    return bn_sum_backward_results(*args[:-1])  # what it writes is what the other returns


# ---- second moments ----


def cross_correlation(r: random.Random) -> list[Any]:
    dtype, groups = r.choice(FLOATS), r.randint(1, 2)
    n, h, w = r.randint(1, 3), r.randint(1, 6), r.randint(1, 6)
    x, y = (last(torch.randn(n, groups * r.randint(1, 4), h, w).to(dtype)) for _ in range(2))
    pivots = [torch.randn(t.shape[1], dtype=sums_dtype(dtype)) for t in (x, y)]
    shifts = [[r.randint(-3, 3) for _ in range(r.randint(1, 4))]] * 2
    return [x, pivots[0], y, pivots[1], shifts[0], shifts[1][::-1], groups]


def cross_correlation_results(
    x: Any, x_pivot: Any, y: Any, y_pivot: Any, rows: Any, columns: Any, groups: Any
) -> list[Any]:
    x, y = wide(x) - per_channel(x_pivot), wide(y) - per_channel(y_pivot)
    h, w = x.shape[2:]
    products = []
    for i, j in zip(rows, columns, strict=True):
        moved = torch.zeros_like(x)
        if abs(i) < h and abs(j) < w:
            moved[:, :, max(0, -i) : h - max(0, i), max(0, -j) : w - max(0, j)] = x[
                :, :, max(0, i) : h + min(0, i), max(0, j) : w + min(0, j)
            ]
        by_group = (t.unflatten(1, (groups, -1)) for t in (y, moved))
        products.append(torch.einsum("ngkhw,ngchw->gkc", *by_group))
    return [torch.stack(products), y.sum(0)]


# ---- whole steps ----


def embedded(x: Tensor, weight: Tensor, row: int, column: int, kernel: int, groups: int) -> Tensor:
    """x convolved at "same" padding by a weight that lies in a kernel of zeros."""
    rows, columns = weight.shape[2:]
    edges = (column, kernel - column - columns, row, kernel - row - rows)
    return F.conv2d(x, F.pad(wide(weight), edges), None, 1, kernel // 2, 1, groups)


def moments_step(r: random.Random) -> list[Any]:
    dtype, groups, k = r.choice(FLOATS), r.randint(1, 2), r.choice([1, 3, 5])
    c, out = r.randint(1, 3), groups * r.randint(1, 3)
    x = layout_of(r, torch.randn(r.randint(2, 3), groups * c, r.randint(2, 6), r.randint(2, 6)).to(dtype))
    shapes, places = [(k, k), (1, k), (k, 1)], [(0, 0), (k // 2, 0), (0, k // 2)]
    b = r.randint(1, 3)
    norms = r.choice([1, b])
    weights = [torch.randn(out, c, *shape).to(dtype) for shape in shapes[:b]]
    gammas, betas = ([torch.randn(out) for _ in range(norms)] if r.random() < 0.7 else [] for _ in range(2))
    taps = [n for place, shape in zip(places[:b], shapes, strict=False) for n in (*place, *shape, 1, norms == b)]
    geometry = packed.pack(Geometry.make(k, 1, k // 2, 1, groups))
    compute = dtype if dtype.itemsize > 2 or r.random() < 0.5 else torch.float32
    return [x, weights, gammas, betas, [1e-3, 1e-4, 1e-5][:norms], taps, geometry, compute, r.random() < 0.5]


def moments_maps(x: Any, weights: Any, norms: int, taps: Any, geometry: Any) -> list[Tensor]:
    places = zip(weights, taps[::6], taps[1::6], strict=True)
    ys = [embedded(wide(x), weight, i, j, geometry[0], geometry[8]) for weight, i, j in places]
    return ys if norms == len(ys) else [sum(ys[1:], ys[0])]


def moments_step_results(
    x: Any, weights: Any, gammas: Any, betas: Any, eps: Any, taps: Any, geometry: Any, *_: Any
) -> list[Any]:
    ys = moments_maps(x, weights, len(eps), taps, geometry)
    out, means, variances, rstds = bn_sum_forward_results(ys, gammas, betas, eps, None)
    if len(x) == 0:
        means, variances, rstds = torch.zeros_like(means), torch.zeros_like(variances), None
    return [out, means, variances, rstds, None, None, None]


def moments_step_backward(r: random.Random) -> list[Any]:
    x, weights, gammas, betas, eps, taps, geometry, compute, last_ = moments_step(r)
    step = torch.ops.acnet_kernels.moments_step(x, weights, gammas, betas, eps, taps, geometry, compute, last_)
    out, means, _, *kept = step
    needs = r.random() < 0.7, [r.random() < 0.7 for _ in weights], r.random() < 0.7
    return [
        torch.randn_like(out), x, weights, gammas, means, *kept, taps, geometry, compute, r.random() < 0.5, *needs
    ]  # fmt: skip


def moments_step_backward_results(
    grad: Any, x: Any, weights: Any, gammas: Any, means: Any, rstds: Any, pivot: Any, sums: Any, centred: Any,
    taps: Any, geometry: Any, compute: Any, accumulates: Any, need_x: Any, need_weights: Any, need_gammas: Any,
) -> list[Any]:  # fmt: skip
    k, groups = geometry[0], geometry[8]
    g, pixels, total = wide(grad), grad.numel() / grad.shape[1], wide(grad).sum((0, 2, 3))
    places = [(own[0], own[1], own[2], own[3]) for own in zip(*(taps[i::6] for i in range(4)), strict=True)]
    kernels = [
        F.pad(wide(w), (j, k - j - n, i, k - i - m)) for w, (i, j, m, n) in zip(weights, places, strict=True)
    ]
    if len(means) < len(kernels):
        kernels, own_places = [sum(kernels[1:], kernels[0])], [(0, 0, k, k)]
    else:
        own_places = places
    patches = sums.unflatten(1, (k, k, -1)).permute(0, 3, 1, 2).repeat_interleave(len(weights[0]) // groups, 0)
    parts = wide(centred).split([m * n * weights[0].shape[1] for _, _, m, n in own_places], 1)
    dx, dkernels, dgammas = torch.zeros_like(wide(x)), [], []
    for b, (kernel, part, (i, j, m, n)) in enumerate(zip(kernels, parts, own_places, strict=True)):
        with torch.enable_grad():
            x_, kernel_ = wide(x).detach().requires_grad_(), kernel.detach().requires_grad_()
            y = F.conv2d(x_, kernel_, None, 1, k // 2, 1, groups)
        dgamma = rstds[b] * ((g * y).sum((0, 2, 3)) - means[b] * total)
        slope, scale = dgamma / pixels, rstds[b] * (wide(gammas[b]) if gammas else 1)
        (products,) = torch.autograd.grad(y, kernel_, g, retain_graph=True)
        dkernel = products - per_channel(total / pixels)[..., None] * patches
        own = part.unflatten(1, (m, n, -1)).permute(0, 3, 1, 2)  # with its rstd already
        dkernel[:, :, i : i + m, j : j + n] -= per_channel(slope)[..., None] * own
        dkernels.append(per_channel(scale)[..., None] * dkernel)
        level = per_channel(slope * rstds[b])
        flow = g - per_channel(total / pixels) - level * (y - per_channel(means[b]))
        dx += torch.autograd.grad(y, x_, (per_channel(scale) * flow).detach())[0]
        dgammas.append(dgamma.detach())
    none = torch.zeros(0, dtype=torch.float64)
    dws = [
        (dkernels[0] if len(dkernels) == 1 else dkernels[b])[:, :, i : i + m, j : j + n]
        for b, (i, j, m, n) in enumerate(places)
    ]
    return [
        dx if need_x else none,
        [dw for dw, need in zip(dws, need_weights, strict=True) if need],
        torch.stack(dgammas) if need_gammas else none,
        total,
    ]


def recompute_step(r: random.Random) -> list[Any]:
    dtype, groups, k = r.choice(FLOATS), r.randint(1, 2), r.choice([1, 3, 5])
    c, out = r.randint(1, 3), groups * r.randint(1, 3)
    geometry = Geometry.make(k, r.randint(1, 2), k // 2, 1, groups)
    taps = [taps for name, taps in taps_of(k).items() if name == "square" or r.random() < 0.7]
    x = layout_of(r, torch.randn(r.randint(2, 3), groups * c, r.randint(3, 7), r.randint(3, 7)).to(dtype))
    weights = [torch.randn(out, c, t.rows, t.columns).to(dtype) for t in taps]
    norms = r.choice([1, len(taps)])
    gammas, betas = ([torch.randn(out) for _ in range(norms)] if r.random() < 0.7 else [] for _ in range(2))
    eps = [1e-3, 1e-4, 1e-5][:norms]
    given = r.choice((dtype, None))
    return [
        x,
        weights,
        gammas,
        betas,
        eps,
        packed.pack_taps(tuple((t, True) for t in taps), [norms == len(taps)] * len(taps)),
        packed.pack(geometry),
        given,
        r.random() < 0.5,
    ]


def branch_maps(x: Tensor, weights: Any, taps: Any, geometry: Any, norms: int) -> list[Tensor]:
    known = packed.unpack(geometry)
    ys = []
    for (own, _), weight in zip(packed.unpack_taps(taps), weights, strict=True):
        place = known.placement(own)
        seen = place.apply(x)
        ys.append(F.conv2d(seen, weight, None, known.stride, place.padding, place.dilation, known.groups))
    return ys if norms == len(ys) else [sum(ys)]


def recompute_step_results(
    x: Any, weights: Any, gammas: Any, betas: Any, eps: Any, names: Any, geometry: Any, dtype: Any, _: Any
) -> list[Any]:
    ys = branch_maps(wide(x), [wide(w) for w in weights], names, geometry, len(eps))
    return bn_sum_forward_results(ys, gammas, betas, eps, None)


def recompute_step_backward(r: random.Random) -> list[Any]:
    x, weights, gammas, betas, eps, names, geometry, dtype, last_ = recompute_step(r)
    out, means, _, rstds = recompute_step_results(x, weights, gammas, betas, eps, names, geometry, dtype, last_)
    needs = [r.random() < 0.7, [r.random() < 0.7 for _ in weights], r.random() < 0.7]
    return [
        layout_of(r, torch.randn(out.shape).to(x.dtype if dtype is None else dtype)),
        x,
        weights,
        gammas,
        means,
        rstds,
        eps,
        names,
        geometry,
        *needs,
    ]


def recompute_step_backward_results(
    grad: Any, x: Any, weights: Any, gammas: Any, means: Any, rstds: Any, eps: Any, names: Any, geometry: Any,
    need_x: Any, need_weights: Any, need_gammas: Any,
) -> list[Any]:  # fmt: skip
    with torch.enable_grad():
        x_ = wide(x).detach().requires_grad_()
        ws = [wide(w).detach().requires_grad_() for w in weights]
        ys = branch_maps(x_, ws, names, geometry, len(eps))
    dys, dgammas, dbeta = norm_gradients(grad, [y.detach() for y in ys], means, rstds, gammas)
    dx, *dws = torch.autograd.grad(ys, [x_, *ws], dys)
    none = torch.zeros(0, dtype=torch.float64)
    return [
        dx if need_x else none,
        [dw for dw, need in zip(dws, need_weights, strict=True) if need],
        dgammas if need_gammas else none,
        dbeta,
    ]


# ---- depthwise blocks ----


def depthwise_step(r: random.Random, nests: bool = True) -> list[Any]:
    dtype, kernel = r.choice(FLOATS), (r.randint(1, 5), r.randint(1, 5)) if r.random() < 0.5 else (3, 3)
    c = r.choice([1, 3, 17])
    out, stride = c * r.choice([1, 1, 2]), r.choices([1, 1, 2], k=2)
    padding = [k // 2 for k in kernel] if r.random() < 0.6 else [r.randint(0, 3) for _ in kernel]
    geometry = Geometry.make(kernel, stride, padding, r.choices([1, 1, 2], k=2), c)
    size = [r.randint(1, 3) + d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    x = layout_of(r, torch.randn(r.randint(2, 3), c, *size).to(dtype))
    found = [(some_taps(r, *kernel), True) for _ in range(r.randint(1, 3))]
    if out == c and geometry.centre is not None and r.random() < 0.5:
        found.append((geometry.centre, False))
    weights = [torch.randn(out, 1, t.rows, t.columns).to(dtype) for t, convolved in found if convolved]
    normed = [r.choice([True, False])] * len(found)
    if nests and r.random() < 0.4:
        normed = [True, *r.choices([True, False], k=len(found) - 1)]
        r.shuffle(normed)
    norms = sum(normed) + (not all(normed) or (nests and r.random() < 0.2))
    gammas, betas = ([torch.randn(out) for _ in range(norms)] if r.random() < 0.7 else [] for _ in range(2))
    eps = [r.choice([1e-2, 1e-1]) for _ in range(norms)]
    numbers = packed.pack_taps(tuple(found), normed), packed.pack(geometry)
    return [x, weights, gammas, betas, eps, *numbers, r.random() < 0.5]


def depthwise_following(r: random.Random, args: list[Any]) -> tuple[Tensor | None, int]:
    """A residual for a step of these arguments, and an activation's number."""
    x, weights, *_, geometry, last_ = args
    shape = len(x), len(weights[0]), *packed.unpack(geometry).output_size(*x.shape[2:])
    layout = torch.channels_last if last_ else torch.contiguous_format
    residual = torch.randn(shape).to(x.dtype).contiguous(memory_format=layout) if r.random() < 0.4 else None
    return residual, r.choice(range(len(EPILOGUES)))


def depthwise_finished_step(r: random.Random) -> list[Any]:
    args = depthwise_step(r)
    return [*args, *depthwise_following(r, args)]


def depthwise_maps(x: Tensor, weights: Any, taps: Any, geometry: Any) -> list[Tensor]:
    known, given, ys = packed.unpack(geometry), iter(weights), []
    for own, convolved in packed.unpack_taps(taps):
        place = known.placement(own)
        y = place.apply(x)
        if convolved:
            y = F.conv2d(y, next(given), None, known.stride, place.padding, place.dilation, known.groups)
        ys.append(y)
    return ys


def depthwise_finished_step_results(*args: Any) -> list[Any]:
    *given, residual, activation = args
    z, *rest = depthwise_step_results(*given)
    if z is not None:
        z = wide(z) if residual is None else wide(z) + wide(residual)
        z = activate(z, EPILOGUES[activation])
    return [z, *rest]


def depthwise_step_results(
    x: Any, weights: Any, gammas: Any, betas: Any, eps: Any, taps: Any, geometry: Any, _: Any
) -> list[Any]:
    ys = depthwise_maps(wide(x), [wide(w) for w in weights], taps, geometry)
    normed = packed.unpack_normed(taps)
    own = sum(normed)
    if x.shape[0] == 0:  # whose statistics are 0, but for what the batch norms in a sum add to its mean
        none = torch.zeros(len(eps), ys[0].shape[1], dtype=torch.float64)
        means = none.clone()
        if 0 < own < len(eps) and betas:
            means[-1] = sum(wide(beta) for beta in betas[:-1])
        return [ys[0], means, none, None, None, None, None]
    total = sum(y for y, has in zip(ys, normed, strict=True) if not has)
    found = []
    if own:
        inner = [y for y, has in zip(ys, normed, strict=True) if has]
        found.append(bn_sum_forward_results(inner, gammas[:own], betas[:own], eps[:own], None))
        total = total + wide(found[0][0])
    if own < len(eps):
        found.append(bn_sum_forward_results([total], gammas[own:], betas[own:], eps[own:], None))
    return [found[-1][0], *(torch.cat([f[i] for f in found]) for i in (1, 2, 3)), None, None, None]


def depthwise_step_backward(r: random.Random) -> list[Any]:
    args = depthwise_step(r)
    x, weights, gammas, betas, _, taps, geometry, last_ = args
    residual, activation = depthwise_following(r, args) if r.random() < 0.7 else (None, 0)
    out, means, _, rstds, pivot, sums, centred = depthwise_plain.step(*args, residual, activation)
    needs = [r.random() < 0.7, [r.random() < 0.7 for _ in weights], r.random() < 0.7]
    grad = layout_of(r, torch.randn(out.shape).to(x.dtype))
    kept = None
    if activation:
        layout = torch.channels_last if last_ else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        kept = out if is_clamp(EPILOGUES[activation]) else residual
    shared = r.random() < 0.5 and not packed.is_nested(len(means), taps)
    averages = torch.randn(len(means) + 1, means.shape[1], dtype=torch.float64) if shared else None
    of_steps = means, rstds, pivot, sums, centred, averages
    after = kept, activation, activation != 0 and r.random() < 0.5
    return [grad, x, weights, gammas, betas, *of_steps, taps, geometry, *needs, *after]


def depthwise_statistics(r: random.Random) -> list[Any]:
    x, weights, _, _, *rest, _ = depthwise_step(r, nests=False)
    return [x, weights, *rest]


def depthwise_statistics_results(x: Any, weights: Any, *rest: Any) -> list[Any]:
    _, means, variances, *_ = depthwise_step_results(x, weights, [], [], *rest, False)
    return [means, variances, None, None, None]


def depthwise_apply(r: random.Random) -> list[Any]:
    x, weights, gammas, betas, eps, *numbers, last_ = depthwise_step(r, nests=False)
    means, variances, pivot, *_ = depthwise_plain.statistics(x, weights, eps, *numbers)
    return [x, weights, gammas, betas, means, 1 / (variances + 0.1).sqrt(), pivot, *numbers, last_]


def depthwise_apply_results(x: Any, weights: Any, gammas: Any, betas: Any, *rest: Any) -> list[Any]:
    wide_ = [[wide(t) for t in own] for own in (weights, gammas, betas)]
    return [depthwise_plain.apply(wide(x), *wide_, *rest)]


def depthwise_step_backward_results(*args: Any) -> list[Any]:
    grad, x, weights, gammas, betas, means, rstds, pivot, sums, centred, *rest = args
    kept = means, rstds, pivot, sums, wide(centred)
    return list(
        depthwise_plain.step_backward(wide(grad), wide(x), [wide(w) for w in weights], gammas, betas, *kept, *rest)
    )


# ---- convolutions of all branches at once ----


def direct_maps(r: random.Random) -> list[Any]:
    rows, columns = r.randint(1, 4), r.randint(1, 4)
    c, dtype = r.choice([1, 3, 17]), r.choice((torch.float32, torch.float16, torch.bfloat16))
    out = r.choice([c, 2, 18])
    x = torch.randn(r.randint(0, 2), c, r.randint(6, 9), r.randint(6, 9)).to(dtype)
    padding, dilation = (r.randint(0, 3), r.randint(0, 3)), (r.randint(1, 2), r.randint(1, 2))
    geometry = Geometry.make((rows, columns), 1, padding, dilation, 1)
    branches = [(some_taps(r, rows, columns), True) for _ in range(r.randint(1, 3))]
    weights = [torch.randn(out, c, taps.rows, taps.columns).to(r.choice(FLOATS)) for taps, _ in branches]
    if c == out and r.random() < 0.5:
        branches.append((Taps(0, 0, 1, 1, 1), False))
    normed = [r.random() < 0.5 for _ in branches]
    numbers = packed.pack_taps(tuple(branches), normed), packed.pack(geometry)
    return [layout_of(r, x), weights, *numbers, r.random() < 0.5]


def direct_ys(x: Tensor, weights: Any, taps: Any, geometry: Any) -> list[Tensor]:
    ys = depthwise_maps(x, weights, taps, geometry)
    return [y for y, (_, convolved) in zip(ys, packed.unpack_taps(taps), strict=True) if convolved]


def direct_maps_results(x: Any, weights: Any, taps: Any, geometry: Any, _: Any) -> list[Any]:
    return [direct_ys(wide(x), [wide(w) for w in weights], taps, geometry)]


def direct_gradients(r: random.Random) -> list[Any]:
    x, weights, taps, geometry, last_ = direct_maps(r)
    need_x, needs = r.random() < 0.7, [r.random() < 0.7 for _ in weights]
    ys = direct_ys(x.float(), [w.float() for w in weights], taps, geometry)
    seen = [y for y, need in zip(ys, needs, strict=True) if need_x or need]
    dys = [layout_of(r, torch.randn_like(y).to(x.dtype)) for y in seen]
    return [dys, x, weights, taps, geometry, need_x, needs, last_]


def direct_gradients_results(
    dys: Any, x: Any, weights: Any, taps: Any, geometry: Any, need_x: Any, needs: Any, _: Any
) -> list[Any]:
    tensors = [wide(t).detach().requires_grad_() for t in (x, *weights)]
    with torch.enable_grad():
        ys = direct_ys(tensors[0], tensors[1:], taps, geometry)
    seen = [y for y, need in zip(ys, needs, strict=True) if need_x or need]
    wanted = [t for t, need in zip(tensors, (need_x, *needs), strict=True) if need]
    found = list(torch.autograd.grad(seen, wanted, [wide(dy) for dy in dys])) if wanted else []
    return [found.pop(0) if need_x else wide(x).new_empty(0), found]


# ---- folding, running statistics ----


def fuse_blocks(r: random.Random) -> list[Any]:
    a = fusing.Arguments.empty()
    for _ in range(r.randint(1, 3)):
        dtype, kernel, groups = r.choice(FLOATS), (r.randint(1, 5), r.randint(1, 5)), r.randint(1, 2)
        c = r.randint(1, 3)
        out = groups * r.choice([c, c, r.randint(1, 3)])
        found: list[Any] = []
        for i in range(r.randint(1, 4)):
            vectors = [torch.randn(out) if r.random() < 0.8 else None for _ in range(4)]
            norm = (*vectors, torch.rand(out) + 0.1 if r.random() < 0.8 else None, 1e-5)
            taps = (0, 0, *kernel, 1) if i == 0 else some_taps(r, *kernel)
            if i and r.random() < 0.3 and out == groups * c:
                found.append(((*taps[:2], 1, 1, 1), None, *norm))
            else:
                found.append((taps, torch.randn(out, c, *taps[2:4]).to(dtype), *norm))
        r.shuffle(found)
        if r.random() < 0.3:
            found.append((None, None, *norm))  # a batch norm after the sum
        append_branches(a, kernel, groups, found)
    return list(a)


def fuse_blocks_results(*args: Any) -> list[Any]:
    return list(fusing.fuse_blocks(*args))


def fuse_blocks_out(r: random.Random) -> list[Any]:
    args = fuse_blocks(r)
    weights, biases = fusing.fuse_blocks(*args)
    return [*args, [layout_of(r, torch.randn_like(w)) for w in weights], [torch.randn_like(b) for b in biases]]


def fuse_blocks_out_results(*args: Any) -> list[Any]:
    return list(fusing.fuse_blocks(*args[:-2]))


def update_running_(r: random.Random) -> list[Any]:
    norms, k = r.randint(1, 3), r.randint(1, 5)
    means, variances = ([torch.rand(k).to(r.choice(FLOATS)) for _ in range(norms)] for _ in range(2))
    counters = [
        torch.tensor(r.randint(0, 9)).to(r.choice([torch.int64, torch.float32, torch.int32])) for _ in means
    ]
    statistics = [torch.rand(norms, k, dtype=torch.float64) for _ in range(2)]
    momenta = [math.nan] if norms == 1 and r.random() < 0.5 else [r.random() for _ in means]
    return [means, variances, counters, *statistics, momenta, r.choice([0, 2, 17])]


def update_running_results(
    running_means: Any, running_vars: Any, counters: Any, means: Any, variances: Any, momenta: Any, count: Any
) -> list[Any]:
    for counter in counters:
        counter.add_(1)
    for b, momentum in enumerate(momenta if count else []):
        factor = 1 / float(counters[0]) if math.isnan(momentum) else momentum
        for target, value in ((running_means[b], means[b]), (running_vars[b], variances[b] * count / (count - 1))):
            target.copy_((1 - factor) * wide(target) + factor * value)
    return [running_means, running_vars, counters]


# ---- Triton's and the driver's, which run on CUDA: here their shape inference is called, on meta tensors ----


def triton_forward(r: random.Random) -> list[Any]:
    rows, columns = r.randint(1, 5), r.randint(1, 5)
    groups, c, out = r.randint(1, 2), r.randint(1, 3), r.randint(1, 3)
    branches = [some_taps(r, rows, columns) for _ in range(r.randint(1, 3))]
    settings = (*r.choices([1, 2], k=2), rows // 2, columns // 2, *r.choices([1, 2], k=2), groups)
    window = Window(rows, columns, *settings, tuple(branches))
    dtype = r.choice((torch.float32, torch.float16, torch.bfloat16))
    x = torch.randn(r.randint(1, 3), groups * c, r.randint(7, 9), r.randint(7, 9)).to(dtype)
    weights = [torch.randn(groups * out, c, taps.rows, taps.columns).to(dtype) for taps in branches]
    affine = ([torch.randn(groups * out) for _ in branches] if r.random() < 0.7 else [] for _ in range(2))
    return to_meta([last(x), weights, *affine, [1e-5] * len(branches), window.flatten()])


def some_taps(r: random.Random, rows: int, columns: int) -> Taps:
    step, row, column = r.randint(1, 2), r.randrange(rows), r.randrange(columns)
    most_rows, most_columns = (rows - row + step - 1) // step, (columns - column + step - 1) // step
    return Taps(row, column, r.randint(1, most_rows), r.randint(1, most_columns), step)


def triton_map(x: Tensor, weights: list[Tensor], numbers: list[int]) -> Tensor:
    """A map of the shape of every branch's."""
    window = Window.unflatten(numbers)
    return last(x.new_empty(len(x), len(weights[0]), *window.output_size(*x.shape[2:])))


def triton_input_grad(r: random.Random) -> list[Any]:
    x, weights, *_, window = triton_forward(r)
    return [[triton_map(x, weights, window) for _ in weights], weights, window, [*x.shape[2:]]]


def triton_weight_grads(r: random.Random) -> list[Any]:
    x, weights, *_, window = triton_forward(r)
    return [x, [triton_map(x, weights, window) for _ in weights], weights, window]


def running_of(r: random.Random, norms: int, k: int) -> list[list[Any]]:
    """running_means, running_vars, counters, shifts and momenta, or none of them."""
    if r.random() < 0.3:
        return [[], [], [], [], []]
    means, variances = ([torch.rand(k).to(r.choice(FLOATS)) for _ in range(norms)] for _ in range(2))
    counters = [torch.tensor(r.randint(0, 9)) for _ in means]
    shifts = [torch.randn(k) for _ in means] if r.random() < 0.5 else []
    return [means, variances, counters, shifts, [r.choice([math.nan, r.random()]) for _ in means]]


def triton_step_(r: random.Random) -> list[Any]:
    x, weights, gammas, betas, eps, window = triton_forward(r)
    running = running_of(r, len(weights), weights[0].shape[0])
    residual = triton_map(x, weights, window) if r.random() < 0.5 else None
    return to_meta([x, weights, gammas, betas, *running, eps, window, residual, r.randrange(5)])


def triton_step_backward_(r: random.Random) -> list[Any]:
    x, weights, gammas, betas, eps, window = triton_forward(r)
    grad, kept, *ys = (triton_map(x, weights, window) for _ in range(len(weights) + 2))
    statistics = (x.new_empty(len(eps), weights[0].shape[0], dtype=torch.float64) for _ in range(2))
    needs = [r.random() < 0.5 for _ in weights]
    activation = r.randrange(5)
    flags = r.random() < 0.5, needs, r.random() < 0.5
    following = kept if activation in (1, 2) or r.random() < 0.5 else None, activation, activation > 0
    return [grad, x, weights, gammas, betas, *statistics, ys, window, *flags, *following]


def triton_bn_sum_(r: random.Random) -> list[Any]:
    ys, gammas, betas, eps, _ = bn_sum_forward(r)
    ys = [last(y.to(torch.float32 if y.dtype == torch.float64 else y.dtype)) for y in ys]
    dtype = r.choice([None, torch.bfloat16]) if ys[0].dtype == torch.float32 else None
    residual = torch.empty_like(ys[0], dtype=dtype) if r.random() < 0.5 else None
    running = running_of(r, len(ys), ys[0].shape[1])
    return to_meta([ys, gammas, betas, *running, eps, dtype, residual, r.randrange(5)])


def replay(r: random.Random) -> list[Any]:
    return [r.randint(-5, -1), 0, [torch.randn(r.randint(0, 4)) for _ in range(r.randint(1, 3))]]


def replay_results(routine: Any, stream: Any, tensors: Any) -> list[Any]:
    return [tensors, []]  # nothing was recorded


def remember(r: random.Random) -> list[Any]:
    _, _, tensors = replay(r)
    kernel = [1, *r.choices(range(1, 9), k=3), 128, 0, 2, 0, 0, -1, 5]
    return to_meta([r.randint(-5, -1), tensors, [torch.randn(3)], r.choice([0, 256]), kernel * r.randint(0, 2)])


def to_meta(value: Any) -> Any:
    """The same with every tensor on the meta device."""
    if isinstance(value, list):
        return [to_meta(v) for v in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def nothing(*_: Any) -> list[Any]:
    raise AssertionError("there is no data to compute from")


CASES = {
    "bn_sum_affine": Case(bn_sum_affine, bn_sum_affine_results),
    "bn_sum_backward": Case(bn_sum_backward, bn_sum_backward_results),
    "bn_sum_backward_": Case(bn_sum_backward_, bn_sum_write_results),
    "bn_sum_epilogue_backward_": Case(bn_sum_epilogue_backward_, bn_sum_epilogue_write_results),
    "bn_sum_epilogue_forward": Case(bn_sum_epilogue_forward, bn_sum_epilogue_forward_results),
    "bn_sum_forward": Case(bn_sum_forward, bn_sum_forward_results),
    "bn_sum_slopes": Case(bn_sum_slopes, bn_sum_slopes_results),
    "cross_correlation": Case(cross_correlation, cross_correlation_results),
    "depthwise_apply": Case(depthwise_apply, depthwise_apply_results),
    "depthwise_statistics": Case(depthwise_statistics, depthwise_statistics_results),
    "depthwise_step": Case(depthwise_finished_step, depthwise_finished_step_results),
    "depthwise_step_backward": Case(depthwise_step_backward, depthwise_step_backward_results),
    "direct_gradients": Case(direct_gradients, direct_gradients_results),
    "direct_maps": Case(direct_maps, direct_maps_results),
    "fuse_blocks": Case(fuse_blocks, fuse_blocks_results),
    "fuse_blocks_out": Case(fuse_blocks_out, fuse_blocks_out_results),
    "moments_step": Case(moments_step, moments_step_results),
    "moments_step_backward": Case(moments_step_backward, moments_step_backward_results),
    "recompute_step": Case(recompute_step, recompute_step_results),
    "recompute_step_backward": Case(recompute_step_backward, recompute_step_backward_results),
    "remember": Case(remember, nothing, "meta"),
    "replay": Case(replay, replay_results),
    "triton_bn_sum_": Case(triton_bn_sum_, nothing, "meta"),
    "triton_forward": Case(triton_forward, nothing, "meta"),
    "triton_input_grad": Case(triton_input_grad, nothing, "meta"),
    "triton_step_": Case(triton_step_, nothing, "meta"),
    "triton_step_backward_": Case(triton_step_backward_, nothing, "meta"),
    "triton_weight_grads": Case(triton_weight_grads, nothing, "meta"),
    "update_running_": Case(update_running_, update_running_results),
}
