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
from ..ops.epilogue import is_clamp
from ..ops.running import NONE
from ..steps.batchnorm import Tracked, Update
from ..steps.triton_phases import alike, last
from . import nodes

if TYPE_CHECKING:
    from ..spec import Epilogue
    from ..steps.maps import StepConfig


class TritonStep(torch.autograd.Function):
    """Of a config, the update, what follows, its residual, x, weights, γs and βs: out; running statistics move."""

    @staticmethod
    def forward(
        ctx: Any,
        config: StepConfig,
        update: Update | Tracked,
        epilogue: Epilogue,
        residual: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        weights, gammas, betas = config.split(tensors)
        running = update.running()
        seen, cast = _as_kernels_take(config, x, weights)
        with below_autograd():
            out, ys, means, variances, rstds = triton_step.forward(
                *(seen, cast, gammas, betas, running or NONE, config.eps, config.window),
                None if residual is None else last(residual),
                epilogue.activation,
            )
        if running is None:
            update(means, variances)
        ctx.config, ctx.activation = config, epilogue.activation
        # A hook on saved tensors may keep what it was given.
        ctx.owns_maps = top_saved_tensors_hooks(True) is None
        # What comes after the sum needs: the activation's output, or what it is computed from again.
        after = [*betas, out if is_clamp(epilogue.activation) else residual] if epilogue.activation else []
        ctx.save_for_backward(x, *weights, *gammas, means, rstds, *after, *ys)
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
        inputs, (means, rstds, *rest) = saved[: branches + config.affine], saved[branches + config.affine :]
        after, ys, activation = rest[:-branches], rest[-branches:], ctx.activation
        needs_residual, needs_x, needs_w = needs[3], needs[4], needs[5 : 5 + branches]
        # Autograd casts what is returned to the inputs' dtypes.
        if nodes.wants_definition(grad):
            given = (x, *inputs)
            definition = functools.partial(config.definition, *given)
            found = nodes.finished_gradients(
                definition, given, (*needs[4:], needs_residual), grad, activation, after
            )
            return None, None, None, found[-1], *found[:-1]
        overwrite = ctx.owns_maps and not keeps_graph()
        seen, cast = _as_kernels_take(config, x, inputs[:branches])
        dr = grad if needs_residual else None
        betas, kept = (after[:-1], after[-1]) if activation else ([], None)
        with below_autograd():
            dxs, given_dws, dgammas, dbeta, drs = triton_step.backward(
                *(bn_sum.like(grad, ys[0]), seen, cast, inputs[branches:], betas, means, rstds, ys, config.window),
                *(needs_x, needs_w, overwrite, None if kept is None else last(kept)),
                *(activation, needs_residual and activation != ""),
            )
        dws: list[Tensor | None] = given_dws  # type: ignore[assignment]
        if not all(needs_w):
            computed = iter(given_dws)
            dws = [next(computed) if need else None for need in needs_w]
        of_gammas = dgammas.unbind() if config.affine else ()
        of_betas = (dbeta,) * (len(needs) - 5 - branches - config.affine)
        dr = drs[0] if drs else dr
        return None, None, None, dr, dxs[0] if needs_x else None, *dws, *of_gammas, *of_betas


def _as_kernels_take(config: StepConfig, x: Tensor, weights: Any) -> tuple[Tensor, Any]:
    """x and the weights in the convolutions' dtype, x in channels_last, the weights in one memory format."""
    dtype = config.conv_dtype
    if any(weight.dtype != dtype for weight in weights):
        weights = [weight.to(dtype) for weight in weights]
    return last(x.to(dtype)), alike(weights)
