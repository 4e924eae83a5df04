"""The autograd of an operator that computes a whole step: what it keeps, its gradients, and its definition's.

Such an operator is (x, weights, gammas, betas, eps, taps, geometry, …) → (out, means, variances, rstds, …), `taps`
and `geometry` as packed.py makes them. One that finishes computes what follows the sum, too: its last arguments are
the residual and the activation's number, as ops/epilogue.py has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..ops.epilogue import ACTIVATIONS, is_clamp
from .maps import config_of
from .packed import is_nested, unpack, unpack_normed, unpack_taps

# (grad, x, weights, γs, what forward left but out and variances, constants) → arguments of the gradients' operator
# but for what is needed, which follows them. Of one that finishes the βs come before what forward left, [] where
# nothing is computed from them.
Arguments = Callable[..., tuple[Any, ...]]


class Definition(NamedTuple):
    """A step by PyTorch's operators.

    `function` computes out but for the βs and what follows of `inputs`: x, the weights and the γs. The first
    `cancelled` βs a batch norm after them takes away again. `after` is None of an operator that does not finish,
    else [] without an activation, and with one the βs and what it is told by.
    """

    function: Callable[[], Tensor]
    inputs: Sequence[Tensor]
    cancelled: int
    activation: str
    after: list[Tensor | None] | None


class Recorded(NamedTuple):
    """An operator (x, weights, γs, βs, constants …) → (out, means, variances, …), and what autograd needs of it.

    `setup` and `backward` are as torch.library.register_autograd takes them.
    """

    operator: Callable[..., tuple[Tensor, ...]]
    setup: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]
    definition: Callable[[Any], Definition]
    finishes: bool


def record(name: str, arguments: Arguments, finishes: bool = False) -> Recorded:
    """Registers the autograd of the operator acnet_kernels::name, whose gradients are name_backward's."""
    operators = torch.ops.acnet_kernels
    gradients = getattr(operators, f"{name}_backward").default

    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        x, weights, gammas, kept, after = _saved(ctx)
        dr = grad if ctx.need_residual else None
        if finishes:
            if ctx.activation:
                layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
                grad = grad.contiguous(memory_format=layout)
            smooth = ctx.activation != 0 and not is_clamp(ACTIVATIONS[ctx.activation])
            given = arguments(grad, x, weights, gammas, after[:-1] if smooth else [], kept, ctx.constants)
            needs_slope = ctx.need_residual and ctx.activation != 0
            told = after[-1] if after else None
            *rest, sloped = gradients(
                *given, ctx.need_x, ctx.need_weights, ctx.need_gammas, told, ctx.activation, needs_slope
            )
            dr = sloped if needs_slope else dr
        else:
            given = arguments(grad, x, weights, gammas, kept, ctx.constants)
            rest = gradients(*given, ctx.need_x, ctx.need_weights, ctx.need_gammas)
        dx, dws, dgammas, dbeta = rest
        found = iter(dws)
        of_gammas = list(dgammas) if ctx.need_gammas else [None] * len(gammas)
        return (
            dx if ctx.need_x else None,
            [next(found) if need else None for need in ctx.need_weights],
            [d if d is None else d.to(gamma.dtype) for gamma, d in zip(gammas, of_gammas, strict=True)],
            [
                torch.zeros_like(dbeta, dtype=dtype) if b < ctx.cancelled else dbeta.to(dtype)
                for b, dtype in enumerate(ctx.beta_dtypes)
            ],
            *(None,) * len(ctx.constants),
            *((dr, None) if finishes else ()),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup(ctx, inputs, output, finishes)

    torch.library.register_autograd(f"acnet_kernels::{name}", backward, setup_context=setup)
    refuse_derivative(f"{name}_backward")
    return Recorded(getattr(operators, name).default, setup, backward, _definition, finishes)


def refuse_derivative(name: str) -> None:
    """Has the operator acnet_kernels::name, of gradients, say that nothing differentiates it."""

    def raise_(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"{name} has no derivative; acblock() has one of every order")

    torch.library.register_autograd(f"acnet_kernels::{name}", raise_)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], finishes: bool) -> None:
    x, weights, gammas, betas, *constants = inputs
    residual, ctx.activation = constants[-2:] if finishes else (None, 0)
    ctx.constants = constants[:-2] if finishes else constants
    out, means, variances, *rest = output
    ctx.mark_non_differentiable(means, variances, *rest)
    after = []
    if ctx.activation:
        told = out if is_clamp(ACTIVATIONS[ctx.activation]) else residual
        after = [*betas, *([] if told is None else [told])]
        ctx.channels_last = ctx.constants[-1]
    ctx.finishes, ctx.after, ctx.is_told = finishes, len(after), len(after) > len(betas)
    ctx.save_for_backward(x, *weights, *gammas, means, *rest, *after)
    ctx.need_residual = residual is not None and residual.requires_grad
    ctx.dtype, ctx.beta_dtypes = out.dtype, [beta.dtype for beta in betas]
    ctx.need_x, ctx.need_weights = x.requires_grad, [weight.requires_grad for weight in weights]
    norms, taps = len(means), ctx.constants[1]
    ctx.cancelled = norms - 1 if is_nested(norms, taps) else 0  # β that the batch norm of the sum takes away again
    ctx.affine, ctx.need_gammas = len(gammas), any(gamma.requires_grad for gamma in gammas)


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
    """(x, weights, γs, what forward left but out and variances, and Definition.after)."""
    x, *rest = ctx.saved_tensors
    n, last = len(ctx.need_weights), len(rest) - ctx.after
    after: list[Tensor | None] = rest[last:]
    if ctx.activation and not ctx.is_told:
        after.append(None)
    return x, rest[:n], rest[n : n + ctx.affine], rest[n + ctx.affine : last], after


def _definition(ctx: Any) -> Definition:
    x, weights, gammas, _, after = _saved(ctx)
    eps, taps, geometry = ctx.constants[:3]
    branches, normed = unpack_taps(taps), unpack_normed(taps)
    config = config_of(unpack(geometry), branches, eps, normed, ctx.affine, ctx.dtype, x.device.type)
    inputs = [x, *weights, *gammas]
    function = functools.partial(config.definition, *inputs)
    return Definition(function, inputs, ctx.cancelled, ACTIVATIONS[ctx.activation], after if ctx.finishes else None)
