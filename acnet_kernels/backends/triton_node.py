"""A step of `branches` whose phases are all Triton's, as one node of autograd's graph: one call a direction.

It computes what backends/branches.py does under this assignment, and differentiates the definition where that does.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._torch_compat import below_autograd, keeps_graph, top_saved_tensors_hooks
from ..ops import bn_sum, triton_step
from ..ops.running import NONE
from ..steps.batchnorm import Update
from ..steps.triton_phases import alike, last
from . import nodes

if TYPE_CHECKING:
    from ..steps.maps import StepConfig


class TritonStep(torch.autograd.Function):
    """Of a config, the update, x, and the weights, γs and βs: out; the running statistics move."""

    @staticmethod
    def forward(ctx: Any, config: StepConfig, update: Update, x: Tensor, *tensors: Tensor) -> Tensor:
        weights, gammas, betas = config.split(tensors)
        running = update.running()
        seen, cast = _as_kernels_take(config, x, weights)
        with below_autograd():
            out, ys, means, variances, rstds = triton_step.forward(
                seen, cast, gammas, betas, running or NONE, config.eps, config.window
            )
        if running is None:
            update(means, variances)
        ctx.config = config
        # A hook on saved tensors may keep what it was given.
        ctx.owns_maps = top_saved_tensors_hooks(True) is None
        ctx.save_for_backward(x, *weights, *gammas, means, rstds, *ys)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        config: StepConfig = ctx.config
        x, *saved = ctx.saved_tensors
        branches = len(config.branches)
        inputs, (means, rstds, *ys) = saved[: branches + config.affine], saved[branches + config.affine :]
        # Autograd casts what is returned to the inputs' dtypes.
        if nodes.wants_definition(grad):
            definition = functools.partial(config.definition, x, *inputs)
            return None, None, *nodes.gradients(definition, (x, *inputs), needs[2:], grad)
        overwrite = ctx.owns_maps and not keeps_graph()
        needs_x, needs_w = needs[2], needs[3 : 3 + branches]
        seen, cast = _as_kernels_take(config, x, inputs[:branches])
        of_norms = (inputs[branches:], means, rstds, ys, config.window)
        with below_autograd():
            dxs, given, dgammas, dbeta = triton_step.backward(
                bn_sum.like(grad, ys[0]), seen, cast, *of_norms, needs_x, needs_w, overwrite
            )
        dws: list[Tensor | None] = given  # type: ignore[assignment]
        if not all(needs_w):
            found = iter(given)
            dws = [next(found) if need else None for need in needs_w]
        of_gammas = dgammas.unbind() if config.affine else ()
        betas = len(needs) - 3 - branches - config.affine
        return None, None, dxs[0] if needs_x else None, *dws, *of_gammas, *(dbeta,) * betas


def _as_kernels_take(config: StepConfig, x: Tensor, weights: Any) -> tuple[Tensor, Any]:
    """x and the weights in the convolutions' dtype, x in channels_last, the weights in one memory format."""
    dtype = config.conv_dtype
    if any(weight.dtype != dtype for weight in weights):
        weights = [weight.to(dtype) for weight in weights]
    return last(x.to(dtype)), alike(weights)
