"""The operators of dense `moments` steps: schema, fake, kernels, autograd.

    moments_step(x, weights, gamma, beta, origins, eps, kernel, groups, channels_last)
        -> (out, mean, variance, pivot, sums, centred)
        out = Σ_b BN_b(W_b * x), "same" padding, stride 1, in x's dtype; differentiable in the tensors. mean and
        (biased) variance are B×K in float64; what follows is for the gradient alone.

Arguments: `x`, N×C×H×W; `weights`, B kernels K×C/groups×rows×columns that lie inside a kernel×kernel one; `gamma`,
B×K; `beta`, K, summed over the branches; `origins`, 2·B ints, the row and column of each kernel's first tap; `eps`,
B floats; `channels_last`, the layout of out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import check
from ..ops.bn_sum import rstds_of
from ..spec import Norm
from . import moments_passes
from .batchnorm import batch_norm
from .convolution import convolution_dtype
from .recorded import Recorded

LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
LIBRARY.define(
    "moments_step(Tensor x, Tensor[] weights, Tensor gamma, Tensor beta, int[] origins, float[] eps, int kernel,"
    " int groups, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "moments_step_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor gamma, Tensor mean, Tensor rstd,"
    " Tensor pivot, Tensor sums, Tensor centred, int[] origins, int kernel, int groups, bool need_x,"
    " bool need_weights, bool need_gamma) -> (Tensor, Tensor, Tensor, Tensor)"
)

moments_step = torch.ops.acnet_kernels.moments_step.default


def check_step(
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor,
    beta: Tensor,
    origins: list[int],
    eps: list[float],
    kernel: int,
    groups: int,
    channels_last: bool,
) -> None:
    """ValueError where an argument of moments_step does not fit the others; the message names it."""
    check.one_device(x=x, weights=weights, gamma=gamma, beta=beta)
    _check_problem(x, weights, gamma, origins, kernel, groups)
    check.shape(gamma.shape[1:], beta=beta)
    check.floats(beta=beta)
    check.length(len(weights), "one a branch", eps=eps)


def _check_problem(
    x: Tensor, weights: list[Tensor], gamma: Tensor, origins: list[int], kernel: int, groups: int
) -> None:
    check.maps(x=x)
    check.kernel_size(kernel)
    if not weights or weights[0].dim() != 4:
        raise ValueError(f"weights must be K×C/groups×rows×columns, got {[tuple(w.shape) for w in weights]}")
    K, C = weights[0].shape[0], x.shape[1]
    check.group_count(groups, x=C, out=K)
    check.floats(weights=weights, gamma=gamma)
    check.shape((len(weights), K), gamma=gamma)
    check.length(2 * len(weights), "row and column of each kernel", origins=origins)
    for i, (weight, row, column) in enumerate(zip(weights, origins[::2], origins[1::2], strict=True)):
        if weight.dim() != 4 or min(weight.shape) < 1 or weight.shape[:2] != (K, C // groups):
            raise ValueError(
                f"weights[{i}] must have shape ({K}, {C // groups}, rows, columns), got {tuple(weight.shape)}"
            )
        rows, columns = weight.shape[2:]
        if not (0 <= row <= kernel - rows and 0 <= column <= kernel - columns):
            raise ValueError(
                f"weights[{i}] of {rows}×{columns} taps at {(row, column)} must lie inside a kernel of {kernel}"
            )


def check_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pivot: Tensor,
    sums: Tensor,
    centred: Tensor,
    origins: list[int],
    kernel: int,
    groups: int,
    need_x: bool,
    need_weights: bool,
    need_gamma: bool,
) -> None:
    """ValueError where an argument of moments_step_backward does not fit the others; the message names it."""
    check.one_device(
        x=x, grad=grad, weights=weights, gamma=gamma, mean=mean, rstd=rstd, pivot=pivot, sums=sums, centred=centred
    )
    _check_problem(x, weights, gamma, origins, kernel, groups)
    (n, c, h, w), dtype = x.shape, _accumulation(x)
    check.shape((n, gamma.shape[1], h, w), grad=grad)
    check.dtype(x.dtype, "as x", grad=grad)
    check.shape(gamma.shape, mean=mean, rstd=rstd)
    check.shape((c,), pivot=pivot)
    check.shape((groups, kernel * kernel * c // groups), sums=sums)
    check.shape((gamma.shape[1], _taps(weights)), centred=centred)
    check.dtype(torch.float64, "as moments_step returns it", mean=mean, rstd=rstd, sums=sums)
    check.dtype(dtype, "as moments_step returns it", pivot=pivot, centred=centred)


def _taps(weights: list[Tensor]) -> int:
    return sum(weight.shape[1] * weight.shape[2] * weight.shape[3] for weight in weights)


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.register_fake("acnet_kernels::moments_step")
@check.checked(check_step)
def _step_fake(
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor,
    beta: Tensor,
    origins: list[int],
    eps: list[float],
    kernel: int,
    groups: int,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    n, c, h, w = x.shape
    k, dtype = weights[0].shape[0], _accumulation(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (
        torch.empty(n, k, h, w, dtype=x.dtype, device=x.device, memory_format=layout),
        x.new_empty(len(weights), k, dtype=torch.float64),
        x.new_empty(len(weights), k, dtype=torch.float64),
        x.new_empty(c, dtype=dtype),
        x.new_empty(groups, kernel * kernel * c // groups, dtype=torch.float64),
        x.new_empty(k, _taps(weights), dtype=dtype),
    )


@torch.library.register_fake("acnet_kernels::moments_step_backward")
@check.checked(check_backward)
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pivot: Tensor,
    sums: Tensor,
    centred: Tensor,
    origins: list[int],
    kernel: int,
    groups: int,
    need_x: bool,
    need_weights: bool,
    need_gamma: bool,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(centred) if need_weights else centred.new_empty(0),
        torch.empty_like(gamma, dtype=torch.float64) if need_gamma else mean.new_empty(0),
        x.new_empty(weights[0].shape[0], dtype=torch.float64),
    )


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gamma, beta, origins, eps, kernel, groups, _ = inputs
    _, mean, variance, pivot, sums, centred = output
    rstd = rstds_of(variance, eps)
    ctx.mark_non_differentiable(mean, variance, pivot, sums, centred)
    ctx.save_for_backward(x, gamma, mean, rstd, pivot, sums, centred, *weights)
    ctx.beta_dtype, ctx.origins, ctx.eps, ctx.kernel, ctx.groups = beta.dtype, origins, eps, kernel, groups
    ctx.need = x.requires_grad, any(weight.requires_grad for weight in weights), gamma.requires_grad


def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, gamma, mean, rstd, pivot, sums, centred, *weights = ctx.saved_tensors
    need_x, need_weights, need_gamma = ctx.need
    dx, dweights, dgamma, dbeta = torch.ops.acnet_kernels.moments_step_backward(
        grad, x, weights, gamma, mean, rstd, pivot, sums, centred, ctx.origins, ctx.kernel, ctx.groups,
        need_x, need_weights, need_gamma,
    )  # fmt: skip
    split: list[Tensor | None] = [None] * len(weights)
    if need_weights:
        parts = dweights.split([weight[0].numel() for weight in weights], 1)
        split = [
            part.reshape(weight.shape).to(weight.dtype) if weight.requires_grad else None
            for part, weight in zip(parts, weights, strict=True)
        ]
    return (
        dx if need_x else None,
        split,
        dgamma.to(gamma.dtype) if need_gamma else None,
        dbeta.to(ctx.beta_dtype),
        *(None,) * 5,
    )


def _no_double_backward(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("moments_step_backward has no derivative; acblock() has one of every order")


torch.library.register_autograd("acnet_kernels::moments_step", backward, setup_context=setup)
torch.library.register_autograd("acnet_kernels::moments_step_backward", _no_double_backward)


def _definition(ctx: Any) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x, gamma, _, _, _, _, _, *weights = ctx.saved_tensors
    half, dtype = ctx.kernel // 2, convolution_dtype(x.dtype, x.device.type)

    def definition() -> Tensor:
        out, wide = torch.zeros((), dtype=dtype, device=x.device), x.to(dtype)
        places = zip(ctx.origins[::2], ctx.origins[1::2], strict=True)
        for weight, own, eps, (row, column) in zip(weights, gamma, ctx.eps, places, strict=True):
            top, left = half - row, half - column
            edges = (left, weight.shape[3] - 1 - left, top, weight.shape[2] - 1 - top)
            y = F.conv2d(F.pad(wide, edges), weight.to(dtype), groups=ctx.groups)
            out = out + batch_norm(y, Norm(own, None, None, None, None, eps, None, True))
        return out

    return definition, [x, *weights, gamma]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("moments_step", check.checked(check_step)(moments_passes.step), _device)
    LIBRARY.impl("moments_step_backward", check.checked(check_backward)(moments_passes.step_backward), _device)
RECORDED = Recorded(moments_step, setup, backward, _definition)
