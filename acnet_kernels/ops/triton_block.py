"""A step's phases by Triton as operators, which torch.compile leaves whole: schema, shapes, kernels.

    triton_forward(x, weights, gammas, betas, eps, window) -> (out, ys, means, rstds)
    triton_input_grad(dys, weights, window, input_size) -> dx
    triton_weight_grads(x, dys, weights, window) -> dws

As triton_conv.block_forward, input_grad and weight_grads take them, but that `ys`, `dws` and a list of dys hold the
branches present alone, and `window` is a triton_conv.Window as a list. No autograd: a backend composes these with
bn_sum_backward and decides what to save. CUDA; under Triton's interpreter, the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import triton_conv
from .triton_conv import Window

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
_LIBRARY.define(
    "triton_forward(Tensor x, Tensor?[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, int[] window)"
    " -> (Tensor, Tensor[], Tensor, Tensor)"
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


@torch.library.impl(_LIBRARY, "triton_forward", _KEY)
def _forward(
    x: Tensor,
    weights: list[Tensor | None],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    out, ys, norms = triton_conv.block_forward(x, weights, gammas, betas, eps, Window(*window))
    return out, ys, norms.means, norms.rstds


@torch.library.impl(_LIBRARY, "triton_input_grad", _KEY)
def _input_grad(
    dys: list[Tensor], weights: list[Tensor | None], window: list[int], input_size: list[int]
) -> Tensor:
    rows, cols = input_size
    return triton_conv.input_grad(_spread(dys, weights), weights, Window(*window), (rows, cols))


@torch.library.impl(_LIBRARY, "triton_weight_grads", _KEY)
def _weight_grads(x: Tensor, dys: list[Tensor], weights: list[Tensor | None], window: list[int]) -> list[Tensor]:
    dws = triton_conv.weight_grads(x, _spread(dys, weights), weights, Window(*window))
    return [dw for dw in dws if dw is not None]


@torch.library.register_fake("acnet_kernels::triton_forward")
def _(
    x: Tensor,
    weights: list[Tensor | None],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    window: list[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    present = [w for w in weights if w is not None]
    K, size = present[0].shape[0], Window(*window).output_size(x.shape[2], x.shape[3])

    def empty() -> Tensor:
        return torch.empty(
            (x.shape[0], K, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )

    means, rstds = (x.new_empty((len(present), K), dtype=torch.float64) for _ in range(2))
    return empty(), [empty() for _ in present], means, rstds


@torch.library.register_fake("acnet_kernels::triton_input_grad")
def _(dys: list[Tensor], weights: list[Tensor | None], window: list[int], input_size: list[int]) -> Tensor:
    square = next(w for w in weights if w is not None)
    shape = (dys[0].shape[0], square.shape[1] * Window(*window).groups, *input_size)
    return torch.empty(shape, dtype=dys[0].dtype, device=dys[0].device, memory_format=torch.channels_last)


@torch.library.register_fake("acnet_kernels::triton_weight_grads")
def _(x: Tensor, dys: list[Tensor], weights: list[Tensor | None], window: list[int]) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights if w is not None]
