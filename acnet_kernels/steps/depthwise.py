"""The operators of depthwise blocks: schema, fake, kernels, autograd.

    depthwise_step(x, weights, gammas, betas, eps, taps, geometry, channels_last, residual, activation)
        -> (out, means, variances, rstds, pivot, sums, centred)
        out = act(Σ_b BN_b(W_b * x) + residual) by the batch's statistics, in x's dtype and the layout named;
        differentiable in the tensors. means, (biased) variances and rstds are B×K in float64. What follows is for
        the gradient alone.
    depthwise_statistics(x, weights, eps, taps, geometry) -> (means, variances, pivot, sums, centred)
    depthwise_apply(x, weights, gammas, betas, means, rstds, pivot, taps, geometry, channels_last) -> out
        Its halves, for statistics that are not x's own.
    depthwise_step_backward(grad, x, weights, gammas, betas, means, rstds, pivot, sums, centred, averages, taps,
                            geometry, need_x, need_weights, need_gammas, kept, activation, need_residual)
            -> (dx, dws, dgammas, dbeta, dresidual)
        Gradients of what is needed; dws holds those of the weights that need one, the others are empty. `averages`,
        unless these maps' own, are those of g·ŷ_b and, last, of g = grad·act'(z): (B + 1)×K, float64. dresidual
        is g.

Arguments: `x`, N×C×H×W of any layout; `weights`, K×1×rows×columns, one entry a convolution; `eps` and, unless [],
`gammas` and `betas` (K), one entry a batch norm: one a branch, or one after their sum, or in depthwise_step and its
gradients one after the sum of branches of which some have their own, in that order; `taps` and `geometry` are
what `pack_taps` and `pack` (packed.py) make of them: C groups, at most MOST_TAPS taps a side, a padding of
at most MOST_PADDING, and K = m·C with m at most MOST_MULTIPLIER. `pivot` (C, float64) is what x was centred by,
`sums` (C×taps, float64) are those of its patches, `centred` holds W_b·(G − SSᵀ/M) of every batch norm's kernel,
K×numbers in float32 or better. Nested, that of the last is Σ s_b W_b + Σ W_u, of the branches with and without a
batch norm of their own, s_b = γ_b·rstd_b; `averages` are for others, and dbeta is the last β's, as those before it
cancel.

`residual` is a map of out's shape, dtype and layout, or None; `activation` an index of ACTIVATIONS
(ops/epilogue.py). Its slope is told by `kept`, a map of grad's layout: of relu and relu6 out; of hardswish and silu
the residual, or None, and `betas`, as z is computed again. Without an activation the residual's gradient is grad.

The C++ kernels (csrc/depthwise.cpp) register themselves for the CPU with the schemas below; CUDA has Triton kernels
(triton_depthwise.py). What is in depthwise_plain.py serves where there are none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import check
from ..ops._extension import LOADED, TRITON
from ..ops.bn_sum import accumulation_dtype
from ..ops.epilogue import ACTIVATIONS, check_activation, is_clamp
from . import depthwise_plain
from .packed import check_affine, check_problem, is_nested, numbers_of, unpack
from .recorded import record

MOST_TAPS, MOST_MULTIPLIER, MOST_PADDING = 7, 8, 1024  # those of csrc/depthwise_plan.h
# Of Triton's kernels: registers hold as many sums as a window has shifts, tables as many kinds of pixels as strides
# make.
MOST_TRITON_TAPS, MOST_TRITON_STRIDE = 5, 4

LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
if not LOADED:
    LIBRARY.define(
        "depthwise_step(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] taps,"
        " int[] geometry, bool channels_last, Tensor? residual, int activation)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    LIBRARY.define(
        "depthwise_statistics(Tensor x, Tensor[] weights, float[] eps, int[] taps, int[] geometry)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    LIBRARY.define(
        "depthwise_apply(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor means, Tensor rstds,"
        " Tensor pivot, int[] taps, int[] geometry, bool channels_last) -> Tensor"
    )
    LIBRARY.define(
        "depthwise_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas,"
        " Tensor means, Tensor rstds, Tensor pivot, Tensor sums, Tensor centred, Tensor? averages, int[] taps,"
        " int[] geometry, bool need_x, bool[] need_weights, bool need_gammas, Tensor? kept=None, int activation=0,"
        " bool need_residual=False) -> (Tensor, Tensor[], Tensor, Tensor, Tensor)"
    )

depthwise_step = torch.ops.acnet_kernels.depthwise_step.default
depthwise_statistics = torch.ops.acnet_kernels.depthwise_statistics.default
depthwise_apply = torch.ops.acnet_kernels.depthwise_apply.default
depthwise_step_backward = torch.ops.acnet_kernels.depthwise_step_backward.default


def check_step(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    channels_last: bool,
    residual: Tensor | None = None,
    activation: int = 0,
) -> None:
    """ValueError where an argument of depthwise_step does not fit the others; the message names it."""
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas, residual=residual)
    shape = _check_problem(x, weights, gammas, len(eps), taps, geometry)
    check_affine(weights, len(eps), betas=betas)
    check_activation(activation, 0)
    _check_outer_map(shape, x.dtype, channels_last, residual=residual)


def _check_outer_map(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, **given: Tensor | None
) -> None:
    """ValueError unless they are maps like out, of its layout."""
    check.shape(shape, **given)
    check.dtype(dtype, "as x", **given)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for name, t in given.items():
        if t is not None and not t.is_contiguous(memory_format=layout):
            raise ValueError(f"{name} must be dense in the layout of out, {layout}, got strides {t.stride()}")


def check_statistics(
    x: Tensor, weights: list[Tensor], eps: list[float], taps: list[int], geometry: list[int]
) -> None:
    """ValueError where an argument of depthwise_statistics does not fit the others; the message names it."""
    check.one_device(x=x, weights=weights)
    _check_problem(x, weights, [], len(eps), taps, geometry, nests=False)


def check_apply(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    taps: list[int],
    geometry: list[int],
    channels_last: bool,
) -> None:
    """ValueError where an argument of depthwise_apply does not fit the others; the message names it."""
    kept = {"means": means, "rstds": rstds, "pivot": pivot}
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas, **kept)
    norms = _norms(means)
    shape = _check_problem(x, weights, gammas, norms, taps, geometry, nests=False)
    check_affine(weights, norms, betas=betas)
    check.shape((norms, shape[1]), means=means, rstds=rstds)
    check.shape((x.shape[1],), pivot=pivot)
    check.dtype(torch.float64, "as depthwise_statistics returns it", **kept)
    check.contiguous(**kept)


def _norms(means: Tensor) -> int:
    if means.dim() != 2:
        raise ValueError(f"means must have shape (norms, K), got {tuple(means.shape)}")
    return means.shape[0]


def _check_problem(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    norms: int,
    taps: list[int],
    geometry: list[int],
    nests: bool = True,
) -> tuple[int, ...]:
    """The shape of the output."""
    shape = check_problem(x, weights, gammas, norms, taps, geometry, nests)
    if max(geometry[:2]) > MOST_TAPS:
        raise ValueError(f"geometry must have a kernel of at most {MOST_TAPS} a side, got {geometry[:2]}")
    if max(geometry[4:6]) > MOST_PADDING:
        raise ValueError(f"geometry must have a padding of at most {MOST_PADDING}, got {geometry[4:6]}")
    if geometry[8] != x.shape[1] or shape[1] > MOST_MULTIPLIER * x.shape[1]:
        raise ValueError(
            f"geometry must have a group for each of x's {x.shape[1]} channels, and weights 1 to {MOST_MULTIPLIER} "
            f"output channels for each, got {geometry[8]} and {shape[1]}"
        )
    return shape


def check_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    sums: Tensor,
    centred: Tensor,
    averages: Tensor | None,
    taps: list[int],
    geometry: list[int],
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
    kept: Tensor | None = None,
    activation: int = 0,
    need_residual: bool = False,
) -> None:
    """ValueError where an argument of depthwise_step_backward does not fit the others; the message names it."""
    found = {"means": means, "rstds": rstds, "pivot": pivot, "sums": sums}
    check.one_device(x=x, grad=grad, weights=weights, gammas=gammas, betas=betas, centred=centred, **found)
    check.one_device(x=x, averages=averages, kept=kept)
    norms, c = _norms(means), x.shape[1] if x.dim() == 4 else 0
    shape = _check_problem(x, weights, gammas, norms, taps, geometry)
    check.shape(shape, grad=grad)
    check.dtype(x.dtype, "as x", grad=grad)
    check.length(len(weights), "one a weight", need_weights=need_weights)
    check.shape((norms, shape[1]), means=means, rstds=rstds)
    check.shape((c,), pivot=pivot)
    check.shape((c, geometry[0] * geometry[1]), sums=sums)
    check.shape((shape[1], numbers_of(norms, taps, geometry)), centred=centred)
    check.dtype(torch.float64, "as depthwise_step returns it", **found)
    check.dtype(accumulation_dtype(x.dtype), "as depthwise_step returns it", centred=centred)
    check.contiguous(centred=centred, averages=averages, **found)
    if averages is not None and is_nested(norms, taps):
        raise ValueError("averages must be None where batch norms are nested: there it is two after another")
    check.shape((norms + 1, shape[1]), averages=averages)
    check.dtype(torch.float64, "as the statistics", averages=averages)
    check_affine(weights, norms, betas=betas)
    check_activation(activation, 0)
    if activation:
        _check_outer_map(shape, x.dtype, not grad.is_contiguous(), grad=grad, kept=kept)
        if kept is None and is_clamp(ACTIVATIONS[activation]):
            raise ValueError("kept must be out, which tells where a clamp is flat, got None")
    elif need_residual:
        raise ValueError("need_residual must be false without an activation: the residual's gradient is grad")


@torch.library.register_fake("acnet_kernels::depthwise_step")
@check.checked(check_step)
def _(
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    betas: Any,
    eps: list[float],
    taps: list[int],
    geometry: list[int],
    channels_last: bool,
    residual: Any = None,
    activation: Any = 0,
) -> tuple[Tensor, ...]:
    means, variances, *rest = _empty_statistics(x, weights, eps, taps, geometry)
    return _empty_out(x, weights, geometry, channels_last), means, variances, torch.empty_like(means), *rest


def _empty_out(x: Tensor, weights: list[Tensor], geometry: list[int], channels_last: bool) -> Tensor:
    size = unpack(geometry).output_size(x.shape[2], x.shape[3])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (x.shape[0], weights[0].shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _empty_statistics(
    x: Tensor, weights: list[Tensor], eps: list[float], taps: list[int], geometry: list[int]
) -> tuple[Tensor, ...]:
    k = weights[0].shape[0]
    return (
        x.new_empty(len(eps), k, dtype=torch.float64),
        x.new_empty(len(eps), k, dtype=torch.float64),
        x.new_empty(x.shape[1], dtype=torch.float64),
        x.new_empty(x.shape[1], geometry[0] * geometry[1], dtype=torch.float64),
        x.new_empty(k, numbers_of(len(eps), taps, geometry), dtype=accumulation_dtype(x.dtype)),
    )


torch.library.register_fake("acnet_kernels::depthwise_statistics")(
    check.checked(check_statistics)(_empty_statistics)
)


@torch.library.register_fake("acnet_kernels::depthwise_apply")
@check.checked(check_apply)
def _(
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    betas: Any,
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    taps: Any,
    geometry: list[int],
    channels_last: bool,
) -> Tensor:
    return _empty_out(x, weights, geometry, channels_last)


@torch.library.register_fake("acnet_kernels::depthwise_step_backward")
@check.checked(check_backward)
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gammas: Any,
    betas: Any,
    means: Tensor,
    rstds: Tensor,
    pivot: Tensor,
    sums: Tensor,
    centred: Tensor,
    averages: Any,
    taps: Any,
    geometry: Any,
    need_x: bool,
    need_weights: list[bool],
    need_gammas: bool,
    kept: Any = None,
    activation: Any = 0,
    need_residual: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        [torch.empty_like(weight) for weight, need in zip(weights, need_weights, strict=True) if need],
        torch.empty_like(means, dtype=dtype) if need_gammas else means.new_empty(0, dtype=dtype),
        means.new_empty(means.shape[1], dtype=dtype),
        torch.empty_like(grad) if need_residual else x.new_empty(0),
    )


def triton_declines(dtype: torch.dtype, kernel: Sequence[int], stride: Sequence[int]) -> str | None:
    """Why Triton's kernels do not compute such a step of CUDA maps, or None."""
    if not TRITON:
        return "Triton is not installed"
    if dtype == torch.float64:
        return f"{dtype} has no kernel"
    if max(kernel) > MOST_TRITON_TAPS:
        return f"a kernel of {kernel[0]}×{kernel[1]} has more than {MOST_TRITON_TAPS} taps a side"
    if max(stride) > MOST_TRITON_STRIDE:
        return f"a stride of {max(stride)} is more than {MOST_TRITON_STRIDE}"
    return None


def _on_cuda(name: str, checks: Callable[..., None], plain: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's CUDA kernel: Triton's where it takes the step, else the one in PyTorch."""
    places = list(plain.__annotations__)

    @check.checked(checks)
    @functools.wraps(plain)
    def kernel(*args: Any) -> Any:
        given = dict(zip(places, args, strict=False))
        x, geometry = given["x"], given["geometry"]
        declined = triton_declines(x.dtype, geometry[:2], geometry[2:4]) is not None
        if len(x) == 0 or declined:
            return plain(*args)
        from . import triton_depthwise  # Triton is slow to import, and only CUDA needs it

        return getattr(triton_depthwise, name)(*args)

    return kernel


_KERNELS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "depthwise_statistics": (check_statistics, depthwise_plain.statistics),
    "depthwise_apply": (check_apply, depthwise_plain.apply),
    "depthwise_step": (check_step, depthwise_plain.step),
    "depthwise_step_backward": (check_backward, depthwise_plain.step_backward),
}
on_cuda = {name: _on_cuda(name, *kernel) for name, kernel in _KERNELS.items()}
for _name, _kernel in on_cuda.items():
    LIBRARY.impl(_name, _kernel, "CUDA")
if not LOADED:
    for _name, (_check, _plain) in _KERNELS.items():
        LIBRARY.impl(_name, check.checked(_check)(_plain), "CPU")

RECORDED = record(
    "depthwise_step",
    lambda grad, x, weights, gammas, betas, kept, constants: (
        grad, x, weights, gammas, betas, *kept, None, *constants[1:3]
    ),
    finishes=True,
)  # fmt: skip
