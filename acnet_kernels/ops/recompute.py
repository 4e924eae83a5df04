"""The operators of the `recompute` backend: schema, fake, autograd. backends/recompute.py registers their kernels.

    recompute_step(x, weights, gammas, betas, eps, branches, geometry, dtype, channels_last)
        -> (out, means, variances, rstds)
        out = Σ_b BN_b(W_b * x) by the batch's statistics, in `dtype`, None for that of x, and the layout named.
    recompute_step_backward(grad, x, weights, gammas, means, rstds, eps, branches, geometry, need_x, need_weights,
                            need_gammas) -> (dx, dws, dgammas, dbeta)
        Gradients of what is needed; dws holds those of the weights that need one, the others are empty.

Arguments: `weights`, `eps` and, unless [], `gammas` and `betas` hold one entry a branch; `branches` names them,
'square', 'hor' and 'ver' in this order; `geometry` is what `pack` makes of one. `means`, `variances` (biased) and
`rstds`: B×K, float64.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..geometry import BRANCHES, Geometry
from . import check
from .bn_sum import accumulation_dtype

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
_LIBRARY.define(
    "recompute_step(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, str[] branches,"
    " int[] geometry, ScalarType? dtype, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "recompute_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor means, Tensor rstds,"
    " float[] eps, str[] branches, int[] geometry, bool need_x, bool[] need_weights, bool need_gammas)"
    " -> (Tensor, Tensor[], Tensor, Tensor)"
)

recompute_step = torch.ops.acnet_kernels.recompute_step.default
recompute_step_backward = torch.ops.acnet_kernels.recompute_step_backward.default


def pack(geometry: Geometry) -> list[int]:
    """A zero-padded geometry as numbers, for an operator's arguments."""
    g = geometry
    return [g.kernel, *g.stride, *g.padding, *g.dilation, g.groups, *g.shift]


def unpack(numbers: list[int]) -> Geometry:
    """The geometry that `pack` was given."""
    kernel, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups, down, right = numbers
    pairs = (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w)
    return Geometry(kernel, *pairs, groups, "zeros", (down, right))


def check_step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    branches: list[str],
    geometry: list[int],
    dtype: torch.dtype | None,
    channels_last: bool,
) -> None:
    """ValueError where an argument of recompute_step does not fit the others; the message names it."""
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas)
    _check_problem(x, weights, gammas, eps, branches, geometry)
    _check_affine(weights, eps, betas=betas)
    if dtype is not None and dtype not in check.FLOATS:
        raise ValueError(f"dtype must be None, float32, float64, float16 or bfloat16, got {dtype}")


def _check_affine(weights: list[Tensor], eps: list[float], **lists: list[Tensor]) -> None:
    for name, values in lists.items():
        if values:
            check.length(len(eps), "as eps, or none", **{name: values})
    check.shape(weights[0].shape[:1], **lists)
    check.floats(**lists)


def _check_problem(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    eps: list[float],
    branches: list[str],
    geometry: list[int],
) -> tuple[int, ...]:
    """The shape of the output."""
    check.maps(x=x)
    if x.shape[0] < 1:
        raise ValueError(f"x must hold an image, got shape {tuple(x.shape)}")
    if not branches or branches[0] != "square" or branches != [name for name in BRANCHES if name in branches]:
        raise ValueError(f"branches must be 'square' and then any of 'hor', 'ver', in this order, got {branches}")
    check.length(len(branches), "one a branch", weights=weights)
    if len(eps) not in (1, len(branches)):
        raise ValueError(f"eps must have {len(branches)} entries, one a branch, or 1, got {len(eps)}")
    check.length(10, "as pack() makes them", geometry=geometry)
    kernel, *rest, groups, down, right = geometry
    check.kernel_size(kernel)
    check.addressable(geometry=geometry)
    known = Geometry.make(kernel, rest[:2], rest[2:4], rest[4:], groups, "zeros", (down, right))
    if weights[0].dim() != 4 or weights[0].shape[0] < 1:
        raise ValueError(f"weights[0] must be K×C/groups×k×k, got {tuple(weights[0].shape)}")
    K, C = weights[0].shape[0], x.shape[1]
    check.group_count(groups, x=C, out=K)
    for i, (name, weight) in enumerate(zip(branches, weights, strict=True)):
        check.shape((K, C // groups, *known.placement(name).kernel), **{f"weights[{i}]": weight})
    check.floats(weights=weights)
    _check_affine(weights, eps, gammas=gammas)
    return (x.shape[0], K, *known.output_size(x.shape[2], x.shape[3]))


def check_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    eps: list[float],
    branches: list[str],
    geometry: list[int],
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
) -> None:
    """ValueError where an argument of recompute_step_backward does not fit the others; the message names it."""
    check.one_device(x=x, grad=grad, weights=weights, gammas=gammas, means=means, rstds=rstds)
    shape = _check_problem(x, weights, gammas, eps, branches, geometry)
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
    branches: Any,
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
    branches: Any,
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
    x, weights, gammas, betas, eps, branches, geometry, dtype, _ = inputs
    ctx.dtype = dtype or x.dtype
    _, means, variances, rstds = output
    ctx.mark_non_differentiable(means, variances, rstds)
    ctx.save_for_backward(x, means, rstds, *weights, *gammas)
    ctx.constants = eps, branches, geometry
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
