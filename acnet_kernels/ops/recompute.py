"""The operators of the `recompute` backend: schema, fake, autograd. backends/recompute.py registers their kernels.

    recompute_step(x, weights, gammas, betas, eps, taps, geometry, dtype, channels_last)
        -> (out, means, variances, rstds)
        out = Σ_b BN_b(W_b * x) by the batch's statistics, in `dtype`, None for that of x, and the layout named.
    recompute_step_backward(grad, x, weights, gammas, means, rstds, eps, taps, geometry, need_x, need_weights,
                            need_gammas) -> (dx, dws, dgammas, dbeta)
        Gradients of what is needed; dws holds those of the weights that need one, the others are empty.

Arguments: `weights` holds one entry a convolution, `eps` and, unless [], `gammas` and `betas` one a batch norm: one
a branch, or one after their sum; `taps` and `geometry` are what `pack_taps` and `pack` make of them. `means`,
`variances` (biased) and `rstds`: B×K, float64.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..geometry import MOST_BRANCHES, Geometry, Taps
from . import check
from .bn_sum import accumulation_dtype

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
_LIBRARY.define(
    "recompute_step(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] taps,"
    " int[] geometry, ScalarType? dtype, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "recompute_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor means, Tensor rstds,"
    " float[] eps, int[] taps, int[] geometry, bool need_x, bool[] need_weights, bool need_gammas)"
    " -> (Tensor, Tensor[], Tensor, Tensor)"
)

recompute_step = torch.ops.acnet_kernels.recompute_step.default
recompute_step_backward = torch.ops.acnet_kernels.recompute_step_backward.default


def pack(geometry: Geometry) -> list[int]:
    """A zero-padded geometry as numbers, for an operator's arguments."""
    g = geometry
    return [*g.kernel, *g.stride, *g.padding, *g.dilation, g.groups]


def unpack(numbers: list[int]) -> Geometry:
    """The geometry that `pack` was given."""
    rows, columns, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups = numbers
    return Geometry((rows, columns), (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), groups, "zeros")


Branches = tuple[tuple[Taps, bool], ...]  # of each branch its taps, and whether it is a convolution or the identity


def pack_taps(branches: Branches) -> list[int]:
    """Branches as five numbers each: their taps', with a step of 0 for the identity."""
    return [n for taps, convolved in branches for n in (*taps[:4], taps.step if convolved else 0)]


def unpack_taps(numbers: list[int]) -> Branches:
    """The branches that `pack_taps` was given."""
    found = []
    for i in range(0, len(numbers), 5):
        row, column, rows, columns, step = numbers[i : i + 5]
        found.append((Taps(row, column, rows, columns, step or 1), step != 0))
    return tuple(found)


def check_step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    dtype: torch.dtype | None,
    channels_last: bool,
) -> None:
    """ValueError where an argument of recompute_step does not fit the others; the message names it."""
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas)
    _check_images(x)
    check_problem(x, weights, gammas, len(eps), taps, geometry)
    check_affine(weights, len(eps), betas=betas)
    if dtype is not None and dtype not in check.FLOATS:
        raise ValueError(f"dtype must be None, float32, float64, float16 or bfloat16, got {dtype}")


def _check_images(x: Tensor) -> None:
    if x.dim() == 4 and x.shape[0] < 1:
        raise ValueError(f"x must hold an image, got shape {tuple(x.shape)}")


def check_affine(weights: list[Tensor], norms: int, **lists: list[Tensor]) -> None:
    """ValueError unless each list is empty or has one vector of K numbers a batch norm."""
    for name, values in lists.items():
        if values:
            check.length(norms, "one a batch norm, or none", **{name: values})
    check.shape(weights[0].shape[:1], **lists)
    check.floats(**lists)


def check_problem(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    norms: int,
    taps: list[int],
    geometry: list[int],
) -> tuple[int, ...]:
    """The shape of the output; ValueError where one of these arguments of a step does not fit the others."""
    check.maps(x=x)
    if not 5 <= len(taps) <= 5 * MOST_BRANCHES or len(taps) % 5:
        raise ValueError(
            f"taps must hold 1 to {MOST_BRANCHES} branches, five numbers each, got {len(taps)} numbers"
        )
    check.length(9, "as pack() makes them", geometry=geometry)
    *rest, groups = geometry
    if max(rest[:2]) > check.MOST_TAPS:
        raise ValueError(f"geometry must have a kernel of at most {check.MOST_TAPS} a side, got {rest[:2]}")
    check.addressable(geometry=geometry, taps=taps)
    known = Geometry.make(rest[:2], rest[2:4], rest[4:6], rest[6:], groups, "zeros")
    branches = unpack_taps(taps)
    check.length(sum(convolved for _, convolved in branches), "one a convolution", weights=weights)
    if norms not in (1, len(branches)):
        raise ValueError(f"eps must have {len(branches)} entries, one a branch, or 1, got {norms}")
    if not weights or weights[0].dim() != 4 or weights[0].shape[0] < 1:
        raise ValueError(f"weights[0] must be K×C/groups×rows×columns, got {[tuple(w.shape) for w in weights[:1]]}")
    K, C = weights[0].shape[0], x.shape[1]
    check.group_count(groups, x=C, out=K)
    given = iter(enumerate(weights))
    for own, convolved in branches:
        known.check_taps(own, "taps")
        if convolved:
            i, weight = next(given)
            check.shape((K, C // groups, own.rows, own.columns), **{f"weights[{i}]": weight})
        elif (own.rows, own.columns) != (1, 1) or known.stride != (1, 1) or C != K:
            raise ValueError(
                f"taps must have the identity on one tap, of maps of {K} channels at stride 1, got {own}"
            )
    check.floats(weights=weights)
    check_affine(weights, norms, gammas=gammas)
    return (x.shape[0], K, *known.output_size(x.shape[2], x.shape[3]))


def check_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> None:
    """ValueError where an argument of recompute_step_backward does not fit the others; the message names it."""
    check.one_device(x=x, grad=grad, weights=weights, gammas=gammas, means=means, rstds=rstds)
    _check_images(x)
    shape = check_problem(x, weights, gammas, len(eps), taps, geometry)
    check.shape(shape, grad=grad)
    check.floats(grad=grad)
    check.length(len(weights), "one a weight", need_weights=need_weights)
    check.shape((len(eps), shape[1]), means=means, rstds=rstds)
    check.dtype(torch.float64, "as recompute_step returns it", means=means, rstds=rstds)
    check.contiguous(means=means, rstds=rstds)


@torch.library.register_fake("acnet_kernels::recompute_step")
@check.checked(check_step)
def _(
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    betas: Any,
    eps: Any,
    taps: Any,
    geometry: list[int],
    dtype: torch.dtype | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K = weights[0].shape[0]
    size = unpack(geometry).output_size(x.shape[2], x.shape[3])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((x.shape[0], K, *size), dtype=dtype or x.dtype, device=x.device, memory_format=layout)
    means, variances, rstds = (x.new_empty((len(eps), K), dtype=torch.float64) for _ in range(3))
    return out, means, variances, rstds


@torch.library.register_fake("acnet_kernels::recompute_step_backward")
@check.checked(check_backward)
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    means: Tensor,
    rstds: Any,
    eps: Any,
    taps: Any,
    geometry: Any,
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    dtype = accumulation_dtype(grad.dtype)
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        [torch.empty_like(w) for w, need in zip(weights, need_weights, strict=True) if need],
        torch.empty_like(means, dtype=dtype) if need_gammas else means.new_empty(0, dtype=dtype),
        means.new_empty(means.shape[1], dtype=dtype),
    )


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weights, gammas, betas, eps, taps, geometry, dtype, _ = inputs
    ctx.dtype = dtype or x.dtype
    _, means, variances, rstds = output
    ctx.mark_non_differentiable(means, variances, rstds)
    ctx.save_for_backward(x, means, rstds, *weights, *gammas)
    ctx.constants = eps, taps, geometry
    ctx.beta_dtypes = [beta.dtype for beta in betas]
    ctx.need_x, ctx.need_weights = x.requires_grad, [weight.requires_grad for weight in weights]
    ctx.need_gammas = any(gamma.requires_grad for gamma in gammas)


def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, means, rstds, *rest = ctx.saved_tensors
    count = len(ctx.need_weights)
    weights, gammas = rest[:count], rest[count:]
    dx, dws, dgammas, dbeta = recompute_step_backward(
        grad, x, weights, gammas, means, rstds, *ctx.constants, ctx.need_x, ctx.need_weights, ctx.need_gammas
    )
    given = iter(dws)
    found = list(dgammas) if ctx.need_gammas else [None] * len(gammas)
    return (
        dx if ctx.need_x else None,
        [next(given) if need else None for need in ctx.need_weights],
        [d if d is None else d.to(gamma.dtype) for gamma, d in zip(gammas, found, strict=True)],
        [dbeta.to(dtype) for dtype in ctx.beta_dtypes],
        *(None,) * 5,
    )


def _no_double_backward(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("recompute_step_backward has no derivative; acblock() has one of every order")


torch.library.register_autograd("acnet_kernels::recompute_step", backward, setup_context=setup)
torch.library.register_autograd("acnet_kernels::recompute_step_backward", _no_double_backward)
