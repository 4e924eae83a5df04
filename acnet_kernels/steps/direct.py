"""The convolutions of all branches of a step at once by csrc/direct.h, as operators for a compiler's graph.

    direct_maps(x, weights, taps, geometry, channels_last) -> ys
        The map of each branch with a weight, in x's dtype and the layout named.
    direct_gradients(dys, x, weights, taps, geometry, need_x, need_weights, channels_last) -> (dx, dws)
        dx is empty and a dW left out where not needed; `dys` holds those that something needs.

Arguments: x and `dys`, float32, bfloat16 or float16 on the CPU; `weights`, one of any float dtype a convolution,
and their gradients; `taps` and `geometry` as packed.py makes them, of stride 1 and one group. Sums are of float32.
They are there where the C++ extension is: whoever calls asks convolution.direct_pays first. The C++ node calls the
same functions past the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import bn_sum, check
from ..ops._extension import LOADED
from .convolution import DIRECT_TYPES, MOST_DIRECT_PADDING, MOST_DIRECT_TAPS
from .maps import StepConfig
from .packed import check_problem, pack, pack_taps, unpack, unpack_normed
from .recorded import refuse_derivative


def maps(config: StepConfig, x: Tensor, weights: tuple[Tensor, ...], channels_last: bool) -> list[Tensor]:
    """config.maps() in the output's dtype; differentiable once. x: N×C×H×W."""
    x = x.to(config.dtype)
    taps, geometry = pack_taps(config.branches, config.normed), pack(config.geometry)
    ys = torch.ops.acnet_kernels.direct_maps.default(x, list(weights), taps, geometry, channels_last)
    given = iter(ys)
    return [
        next(given) if convolved else bn_sum.like(place.apply(x), ys[0])
        for place, (_, convolved) in zip(config.places, config.branches, strict=True)
    ]


def _check_maps(
    x: Tensor, weights: list[Tensor], taps: list[int], geometry: list[int], channels_last: bool
) -> None:
    _shape_of(x, weights, taps, geometry)


def _shape_of(x: Tensor, weights: list[Tensor], taps: list[int], geometry: list[int]) -> tuple[int, ...]:
    # Of each of the maps, once all is found to fit.
    check.one_device(x=x, weights=weights)
    shape = check_problem(x, weights, [], sum(unpack_normed(taps)) + 1, taps, geometry, nests=True)
    if x.dtype not in DIRECT_TYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    known = unpack(geometry)
    if max(known.kernel) > MOST_DIRECT_TAPS:
        raise ValueError(f"geometry must have a kernel of 1 to {MOST_DIRECT_TAPS} taps a side, got {known.kernel}")
    if known.stride != (1, 1) or known.groups != 1:
        raise ValueError(f"geometry must have strides of 1 and one group, got {known.stride} and {known.groups}")
    if max(*known.padding, *known.dilation) > MOST_DIRECT_PADDING:
        raise ValueError(f"geometry must have a padding and dilation of at most {MOST_DIRECT_PADDING}")
    return shape


def _check_gradients(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    taps: list[int],
    geometry: list[int],
    need_x: bool,
    need_weights: list[bool],
    _: bool,
) -> None:
    check.one_device(x=x, dys=dys)
    shape = _shape_of(x, weights, taps, geometry)
    check.length(len(weights), "one a convolution", need_weights=need_weights)
    wanted = len(weights) if need_x else sum(need_weights)
    check.length(wanted, "one for each convolution that something needs", dys=dys)
    check.shape(shape, dys=dys)
    check.dtype(x.dtype, "the dtype of x", **{f"dys[{i}]": dy for i, dy in enumerate(dys)})


def _empty(x: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    return x.new_empty(shape).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    wanted = [ctx.need_x or need for need in ctx.need_weights]
    dys = [
        x.new_zeros(ctx.shape) if grad is None else grad for grad, need in zip(grads, wanted, strict=True) if need
    ]
    dx, dws = torch.ops.acnet_kernels.direct_gradients.default(
        dys, x, rest, ctx.taps, ctx.geometry, ctx.need_x, ctx.need_weights, ctx.channels_last
    )
    found = iter(dws)
    of_weights = [next(found) if need else None for need in ctx.need_weights]
    return dx if ctx.need_x else None, of_weights, None, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, ctx.taps, ctx.geometry, ctx.channels_last = inputs
    ctx.save_for_backward(x, *weights)
    ctx.need_x, ctx.need_weights = x.requires_grad, [weight.requires_grad for weight in weights]
    ctx.shape = output[0].shape


if LOADED:

    @torch.library.register_fake("acnet_kernels::direct_maps")
    @check.checked(_check_maps)
    def _(x: Tensor, weights: list[Tensor], taps: Any, geometry: Any, channels_last: bool) -> list[Tensor]:
        size = unpack(geometry).output_size(x.shape[2], x.shape[3])
        return [_empty(x, (x.shape[0], weight.shape[0], *size), channels_last) for weight in weights]

    @torch.library.register_fake("acnet_kernels::direct_gradients")
    @check.checked(_check_gradients)
    def _(
        dys: list[Tensor],
        x: Tensor,
        weights: list[Tensor],
        taps: Any,
        geometry: Any,
        need_x: bool,
        need_weights: list[bool],
        channels_last: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        return (
            _empty(x, (*x.shape,), channels_last) if need_x else x.new_empty(0),
            [torch.empty_like(w) for w, need in zip(weights, need_weights, strict=True) if need],
        )

    torch.library.register_autograd("acnet_kernels::direct_maps", _backward, setup_context=_setup)
    refuse_derivative("direct_gradients")
