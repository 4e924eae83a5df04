"""A step's phases by Triton as operators, which torch.compile leaves whole: schema, shapes, kernels.

    triton_forward(x, square, hor, ver, gammas, betas, eps, window) -> (out, ys, means, variances, rstds)
    triton_input_grad(dys, weights, window, input_size) -> dx
    triton_weight_grads(x, dys, weights, window) -> dws

As triton_conv.block_forward, input_grad and weight_grads take them, but that `ys`, `dws` and a list of dys hold the
branches present alone, and `window` is a triton_conv.Window as a list. `out` is differentiable, once, by
bn_sum_backward and the other two, for which the y_b are kept. CUDA; under Triton's interpreter, the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import bn_sum, check, triton_conv
from .triton_conv import Window

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
_LIBRARY.define(
    "triton_forward(Tensor x, Tensor square, Tensor? hor, Tensor? ver, Tensor[] gammas, Tensor[] betas,"
    " float[] eps, int[] window) -> (Tensor, Tensor[], Tensor, Tensor, Tensor)"
)
_LIBRARY.define("triton_input_grad(Tensor[] dys, Tensor?[] weights, int[] window, SymInt[2] input_size) -> Tensor")
_LIBRARY.define("triton_weight_grads(Tensor x, Tensor[] dys, Tensor?[] weights, int[] window) -> Tensor[]")

triton_forward = torch.ops.acnet_kernels.triton_forward.default
triton_input_grad = torch.ops.acnet_kernels.triton_input_grad.default
triton_weight_grads = torch.ops.acnet_kernels.triton_weight_grads.default

_KEY = "CPU" if triton_conv.INTERPRETED else "CUDA"


def _spread(present: Sequence[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The present branches' tensors with None where a weight is None."""
    if len(present) != sum(w is not None for w in weights):
        raise ValueError(f"dys must hold a tensor for each of the weights, got {len(present)}")
    given: Iterator[Tensor] = iter(present)
    return [None if w is None else next(given) for w in weights]


def _square_of(weights: Sequence[Tensor | None]) -> Tensor:
    if len(weights) != 3 or (square := weights[0]) is None or square.dim() != 4 or min(square.shape) < 1:
        raise ValueError("weights must be (square, hor or None, ver or None), square K×C/groups×k×k")
    return square


# Shape inference checks the weights itself; where a kernel runs, triton_conv does, and keeps what it worked out.
def _output_shape(shape: Sequence[int], weights: Sequence[Tensor | None], numbers: list[int]) -> tuple[int, ...]:
    square = _square_of(weights)
    window = Window(*numbers)
    size = triton_conv.checked_size(window, shape)
    check.group_count(window.groups, x=shape[1], out=square.shape[0])
    k = window.kernel
    for i, lines in enumerate(((k, k), (1, k), (k, 1))):
        check.shape((square.shape[0], shape[1] // window.groups, *lines), **{f"weights[{i}]": weights[i]})
    return shape[0], square.shape[0], *size


def _check_forward(
    x: Tensor,
    square: Tensor,
    hor: Tensor | None,
    ver: Tensor | None,
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> None:
    weights = (square, hor, ver)
    check.one_device(x=x, weights=weights, gammas=gammas, betas=betas)
    check.maps(x=x)
    check.dtype(x.dtype, "as x", weights=weights)
    check.length(len(Window._fields), "a Window's", window=window)
    present = sum(w is not None for w in weights)
    check.length(present, "one a branch", eps=eps)
    for name, vectors in (("gammas", gammas), ("betas", betas)):
        if vectors:
            check.length(present, "one a branch, or none", **{name: vectors})
        check.shape(square.shape[:1], **{name: vectors})
    check.floats(gammas=gammas, betas=betas)


def _check_grads(dys: list[Tensor], weights: list[Tensor | None], window: list[int]) -> None:
    _square_of(weights)
    _spread(dys, weights)
    check.maps(dys=dys)
    check.dtype(dys[0].dtype, "as dys[0]", dys=dys, weights=weights)
    check.length(len(Window._fields), "a Window's", window=window)


def _check_input_grad(
    dys: list[Tensor], weights: list[Tensor | None], window: list[int], input_size: list[int]
) -> None:
    check.one_device(dys=dys, weights=weights)
    _check_grads(dys, weights, window)
    check.length(2, "rows and columns", input_size=input_size)
    if min(input_size) < 1:
        raise ValueError(f"input_size must be above 0, got {tuple(input_size)}")


def _check_weight_grads(x: Tensor, dys: list[Tensor], weights: list[Tensor | None], window: list[int]) -> None:
    check.one_device(x=x, dys=dys, weights=weights)
    check.maps(x=x)
    _check_grads(dys, weights, window)
    check.dtype(x.dtype, "as x", dys=dys)


@torch.library.impl(_LIBRARY, "triton_forward", _KEY)
@check.checked(_check_forward)
def _forward(
    x: Tensor,
    square: Tensor,
    hor: Tensor | None,
    ver: Tensor | None,
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):  # Triton launches on the current device
        out, ys, norms = triton_conv.block_forward(x, (square, hor, ver), gammas, betas, eps, Window(*window))
    return out, ys, norms.means, norms.variances, norms.rstds


@torch.library.impl(_LIBRARY, "triton_input_grad", _KEY)
@check.checked(_check_input_grad)
def _input_grad(
    dys: list[Tensor], weights: list[Tensor | None], window: list[int], input_size: list[int]
) -> Tensor:
    rows, cols = input_size
    with torch.cuda.device_of(dys[0]):
        return triton_conv.input_grad(_spread(dys, weights), weights, Window(*window), (rows, cols))


@torch.library.impl(_LIBRARY, "triton_weight_grads", _KEY)
@check.checked(_check_weight_grads)
def _weight_grads(x: Tensor, dys: list[Tensor], weights: list[Tensor | None], window: list[int]) -> list[Tensor]:
    with torch.cuda.device_of(x):
        dws = triton_conv.weight_grads(x, _spread(dys, weights), weights, Window(*window))
    return [dw for dw in dws if dw is not None]


@torch.library.register_fake("acnet_kernels::triton_forward")
@check.checked(_check_forward)
def _(
    x: Tensor,
    square: Tensor,
    hor: Tensor | None,
    ver: Tensor | None,
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    shape, present = _output_shape(x.shape, (square, hor, ver), window), len(eps)

    def empty() -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    means, variances, rstds = (x.new_empty((present, shape[1]), dtype=torch.float64) for _ in range(3))
    return empty(), [empty() for _ in range(present)], means, variances, rstds


@torch.library.register_fake("acnet_kernels::triton_input_grad")
@check.checked(_check_input_grad)
def _(dys: list[Tensor], weights: list[Tensor | None], window: list[int], input_size: list[int]) -> Tensor:
    shape = (dys[0].shape[0], _square_of(weights).shape[1] * Window(*window).groups, *input_size)
    check.shape(_output_shape(shape, weights, window), dys=dys)
    return torch.empty(shape, dtype=dys[0].dtype, device=dys[0].device, memory_format=torch.channels_last)


@torch.library.register_fake("acnet_kernels::triton_weight_grads")
@check.checked(_check_weight_grads)
def _(x: Tensor, dys: list[Tensor], weights: list[Tensor | None], window: list[int]) -> list[Tensor]:
    check.shape(_output_shape(x.shape, weights, window), dys=dys)
    return [torch.empty_like(w) for w in weights if w is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, square, hor, ver, gammas, betas, _, window = inputs
    _, ys, means, variances, rstds = output
    ctx.mark_non_differentiable(*ys, means, variances, rstds)
    weights = (square, hor, ver)
    ctx.present = [w is not None for w in weights]
    ctx.needs_w = [w is not None and w.requires_grad for w in weights]
    ctx.needs_x, ctx.window = x.requires_grad, window
    ctx.beta_dtypes = [beta.dtype for beta in betas]
    ctx.save_for_backward(x, *[w for w in weights if w is not None], *ys, means, rstds, *gammas)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    n = sum(ctx.present)
    given, ys, (means, rstds), gammas = rest[:n], rest[n : 2 * n], rest[2 * n : 2 * n + 2], rest[2 * n + 2 :]
    weights = [given.pop(0) if there else None for there in ctx.present]
    needs_w = any(ctx.needs_w)
    grad = grad.contiguous(memory_format=torch.channels_last)
    wanted = [ctx.needs_x or needs_w] * n
    dys, dgammas, dbeta = bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, wanted)
    dx = triton_input_grad(dys, weights, ctx.window, x.shape[2:]) if ctx.needs_x else None
    found = triton_weight_grads(x, dys, weights, ctx.window) if needs_w else []
    dws = _spread(found, weights) if needs_w else [None] * 3
    return (
        dx,
        *(dw if need else None for dw, need in zip(dws, ctx.needs_w, strict=True)),
        [d.to(gamma.dtype) for gamma, d in zip(gammas, dgammas, strict=False)],
        [dbeta.to(dtype) for dtype in ctx.beta_dtypes],
        None,
        None,
    )


torch.library.register_autograd("acnet_kernels::triton_forward", _autograd, setup_context=_setup_context)
