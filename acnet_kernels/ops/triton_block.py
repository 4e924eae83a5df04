"""A step's phases by Triton as operators, which torch.compile leaves whole: schema, shapes, kernels.

    triton_forward(x, weights, gammas, betas, eps, window) -> (out, ys, means, variances, rstds)
    triton_input_grad(dys, weights, window, input_size) -> dx
    triton_weight_grads(x, dys, weights, window) -> dws

As triton_conv.block_forward, input_grad and weight_grads take them, but that `window` is what Window.flatten makes
of a triton_conv.Window. `out` is differentiable, once, by bn_sum_backward and the other two, for which the y_b are
kept. CUDA; under Triton's interpreter, the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import bn_sum, check, launch, triton_conv
from .running import NONE, Running
from .triton_conv import Window

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
_LIBRARY.define(
    "triton_forward(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] window)"
    " -> (Tensor, Tensor[], Tensor, Tensor, Tensor)"
)
_LIBRARY.define("triton_input_grad(Tensor[] dys, Tensor[] weights, int[] window, SymInt[2] input_size) -> Tensor")
_LIBRARY.define("triton_weight_grads(Tensor x, Tensor[] dys, Tensor[] weights, int[] window) -> Tensor[]")

triton_forward = torch.ops.acnet_kernels.triton_forward.default
triton_input_grad = torch.ops.acnet_kernels.triton_input_grad.default
triton_weight_grads = torch.ops.acnet_kernels.triton_weight_grads.default

_KEY = "CPU" if triton_conv.INTERPRETED else "CUDA"


# Routines (ops/launch.py): a convolution's precision, which PyTorch's switches set, is one of their constants.
def forward_routine(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Running,
    eps: Sequence[float],
    window: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "",
) -> tuple[Any, ...]:
    """launch.run's arguments, for [out, means, variances, rstds, *ys]; running statistics are moved."""
    means, variances, counters, shifts, momenta = running
    tensors = [x, *weights, *gammas, *betas, *means, *variances, *counters, *shifts]
    counts = (len(weights), len(gammas), len(betas), len(means), len(shifts))
    if residual is not None:
        tensors.append(residual)
    precision = triton_conv.precision_of(x.dtype)
    return _forward_routine, tensors, counts, tuple(momenta), tuple(eps), tuple(window), activation, precision


def _forward_routine(
    tensors: Sequence[Tensor],
    counts: tuple[int, ...],
    momenta: tuple[float | None, ...],
    eps: tuple[float, ...],
    window: tuple[int, ...],
    activation: str,
    precision: str,
) -> list[Tensor]:
    branches, gammas, betas, norms, shifts = counts
    counts = (1, branches, gammas, betas, norms, norms, norms, shifts)
    (x,), weights, scales, offsets, means, variances, counters, moved, rest = launch.split(
        tensors, (*counts, len(tensors) - sum(counts))
    )
    running = Running(means, variances, counters, moved, momenta)
    own, residual = Window.unflatten(window), rest[0] if rest else None
    args = (x, weights, scales, offsets, eps, own, running, residual, activation)
    out, ys, found = triton_conv.block_forward(*args)
    return [out, found.means, found.variances, found.rstds, *ys]


def _input_grad_routine(
    tensors: Sequence[Tensor], branches: int, window: tuple[int, ...], input_size: tuple[int, int], precision: str
) -> list[Tensor]:
    dys, weights = launch.split(tensors, (branches, branches))
    return [triton_conv.input_grad(dys, weights, Window.unflatten(window), input_size)]


def _weight_grads_routine(
    tensors: Sequence[Tensor], branches: int, window: tuple[int, ...], precision: str
) -> list[Tensor]:
    (x,), dys, weights = launch.split(tensors, (1, branches, branches))
    return triton_conv.weight_grads(x, dys, weights, Window.unflatten(window))


# Shape inference checks the weights itself; where a kernel runs, triton_conv does, and keeps what it worked out.
def output_shape(shape: Sequence[int], weights: list[Tensor], numbers: list[int]) -> tuple[int, ...]:
    """The shape of every branch's map of an input of `shape`; ValueError where there is none."""
    window, channels = Window.unflatten(numbers), weights[0].shape[0]
    size = triton_conv.checked_size(window, shape)
    check.group_count(window.groups, x=shape[1], out=channels)
    for i, (weight, taps) in enumerate(zip(weights, window.branches, strict=True)):
        check.shape((channels, shape[1] // window.groups, taps.rows, taps.columns), **{f"weights[{i}]": weight})
    return shape[0], channels, *size


def empty_forward(
    x: Tensor, weights: list[Tensor], eps: list[float], window: list[int]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """What triton_forward returns, unwritten; ValueError where there is no output of that shape."""
    shape = output_shape(x.shape, weights, window)

    def empty() -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    means, variances, rstds = (x.new_empty((len(eps), shape[1]), dtype=torch.float64) for _ in range(3))
    return empty(), [empty() for _ in eps], means, variances, rstds


def check_weights(weights: list[Tensor], window: list[int]) -> None:
    """ValueError where the weights are not a branch of the window each."""
    check.length(len(Window.unflatten(window).branches), "one a branch of the window", weights=weights)
    check.maps(weights=weights)


def check_forward(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> None:
    """ValueError where triton_forward's arguments do not fit each other; the message names one."""
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas)
    check.maps(x=x)
    check.dtype(x.dtype, "as x", weights=weights)
    check_weights(weights, window)
    check.length(len(weights), "one a branch", eps=eps)
    for name, vectors in (("gammas", gammas), ("betas", betas)):
        if vectors:
            check.length(len(weights), "one a branch, or none", **{name: vectors})
        check.shape(weights[0].shape[:1], **{name: vectors})
    check.floats(gammas=gammas, betas=betas)


def _check_grads(dys: list[Tensor], weights: list[Tensor], window: list[int]) -> None:
    check_weights(weights, window)
    check.length(len(weights), "one for each of the weights", dys=dys)
    check.maps(dys=dys)
    check.dtype(dys[0].dtype, "as dys[0]", dys=dys, weights=weights)


def _check_input_grad(dys: list[Tensor], weights: list[Tensor], window: list[int], input_size: list[int]) -> None:
    check.one_device(dys=dys, weights=weights)
    _check_grads(dys, weights, window)
    check.length(2, "rows and columns", input_size=input_size)
    if min(input_size) < 1:
        raise ValueError(f"input_size must be above 0, got {tuple(input_size)}")


def _check_weight_grads(x: Tensor, dys: list[Tensor], weights: list[Tensor], window: list[int]) -> None:
    check.one_device(x=x, dys=dys, weights=weights)
    check.maps(x=x)
    _check_grads(dys, weights, window)
    check.dtype(x.dtype, "as x", dys=dys)


@torch.library.impl(_LIBRARY, "triton_forward", _KEY)
@check.checked(check_forward)
def _forward(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    out, means, variances, rstds, *ys = launch.run(*forward_routine(x, weights, gammas, betas, NONE, eps, window))
    return out, ys, means, variances, rstds


@torch.library.impl(_LIBRARY, "triton_input_grad", _KEY)
@check.checked(_check_input_grad)
def _input_grad(dys: list[Tensor], weights: list[Tensor], window: list[int], input_size: list[int]) -> Tensor:
    numbers, precision = (tuple(window), tuple(input_size)), triton_conv.precision_of(dys[0].dtype)
    (dx,) = launch.run(_input_grad_routine, [*dys, *weights], len(dys), *numbers, precision)
    return dx


@torch.library.impl(_LIBRARY, "triton_weight_grads", _KEY)
@check.checked(_check_weight_grads)
def _weight_grads(x: Tensor, dys: list[Tensor], weights: list[Tensor], window: list[int]) -> list[Tensor]:
    precision = triton_conv.precision_of(x.dtype)
    return launch.run(_weight_grads_routine, [x, *dys, *weights], len(dys), tuple(window), precision)


@torch.library.register_fake("acnet_kernels::triton_forward")
@check.checked(check_forward)
def _(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    return empty_forward(x, weights, eps, window)


@torch.library.register_fake("acnet_kernels::triton_input_grad")
@check.checked(_check_input_grad)
def _(dys: list[Tensor], weights: list[Tensor], window: list[int], input_size: list[int]) -> Tensor:
    shape = (dys[0].shape[0], weights[0].shape[1] * Window.unflatten(window).groups, *input_size)
    check.shape(output_shape(shape, weights, window), dys=dys)
    return torch.empty(shape, dtype=dys[0].dtype, device=dys[0].device, memory_format=torch.channels_last)


@torch.library.register_fake("acnet_kernels::triton_weight_grads")
@check.checked(_check_weight_grads)
def _(x: Tensor, dys: list[Tensor], weights: list[Tensor], window: list[int]) -> list[Tensor]:
    check.shape(output_shape(x.shape, weights, window), dys=dys)
    return [torch.empty_like(w) for w in weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weights, gammas, betas, _, window = inputs
    _, ys, means, variances, rstds = output
    ctx.mark_non_differentiable(*ys, means, variances, rstds)
    ctx.needs_w = [w.requires_grad for w in weights]
    ctx.needs_x, ctx.window = x.requires_grad, window
    ctx.beta_dtypes = [beta.dtype for beta in betas]
    ctx.save_for_backward(x, *weights, *ys, means, rstds, *gammas)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    n, needs_w = len(ctx.needs_w), ctx.needs_w
    weights, ys, (means, rstds), gammas = rest[:n], rest[n : 2 * n], rest[2 * n : 2 * n + 2], rest[2 * n + 2 :]
    grad = grad.contiguous(memory_format=torch.channels_last)
    wanted = [ctx.needs_x or need for need in needs_w]
    found, dgammas, dbeta = bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, wanted)
    given = iter(found)
    dys = [next(given) if want else None for want in wanted]
    dx = triton_input_grad(dys, weights, ctx.window, x.shape[2:]) if ctx.needs_x else None
    chosen = [b for b, need in enumerate(needs_w) if need]
    dws: list[Tensor | None] = [None] * n
    if chosen:
        window = Window.unflatten(ctx.window).only(chosen).flatten()
        grads = triton_weight_grads(x, [dys[b] for b in chosen], [weights[b] for b in chosen], window)
        for b, dw in zip(chosen, grads, strict=True):
            dws[b] = dw
    return (
        dx,
        dws,
        [d.to(gamma.dtype) for gamma, d in zip(gammas, dgammas, strict=False)],
        [dbeta.to(dtype) for dtype in ctx.beta_dtypes],
        None,
        None,
    )


torch.library.register_autograd("acnet_kernels::triton_forward", _autograd, setup_context=_setup_context)
