"""The autograd of an operator that computes a whole step: what it keeps, its gradients, and its definition's.

Such an operator is (x, weights, gammas, betas, eps, taps, geometry, …) → (out, means, variances, rstds, …), `taps`
and `geometry` as packed.py makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .maps import config_of
from .packed import is_nested, unpack, unpack_normed, unpack_taps

# (grad, x, weights, γs, what forward left but out and variances, constants) → arguments of the gradients' operator
# but for what is needed, which follows them.
Arguments = Callable[[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Any]], tuple[Any, ...]]


class Recorded(NamedTuple):
    """An operator (x, weights, γs, βs, constants …) → (out, means, variances, …), and what autograd needs of it.

    `setup` and `backward` are as torch.library.register_autograd takes them. `definition` gives, of the context,
    a function that computes out but for the βs by PyTorch's operators, its inputs: x, the weights and the γs, and
    how many βs, the first, a batch norm after them takes away again.
    """

    operator: Callable[..., tuple[Tensor, ...]]
    setup: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]
    definition: Callable[[Any], tuple[Callable[[], Tensor], Sequence[Tensor], int]]


def record(name: str, arguments: Arguments) -> Recorded:
    """Registers the autograd of the operator acnet_kernels::name, whose gradients are name_backward's."""
    operators = torch.ops.acnet_kernels
    gradients = getattr(operators, f"{name}_backward").default

    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        x, weights, gammas, kept = _saved(ctx)
        given = arguments(grad, x, weights, gammas, kept, ctx.constants)
        dx, dws, dgammas, dbeta = gradients(*given, ctx.need_x, ctx.need_weights, ctx.need_gammas)
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
        )

    def no_double_backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"{name}_backward has no derivative; acblock() has one of every order")

    torch.library.register_autograd(f"acnet_kernels::{name}", backward, setup_context=_setup)
    torch.library.register_autograd(f"acnet_kernels::{name}_backward", no_double_backward)
    return Recorded(getattr(operators, name).default, _setup, backward, _definition)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, gammas, betas, *ctx.constants = inputs
    out, means, variances, *rest = output
    ctx.mark_non_differentiable(means, variances, *rest)
    ctx.save_for_backward(x, *weights, *gammas, means, *rest)
    ctx.dtype, ctx.beta_dtypes = out.dtype, [beta.dtype for beta in betas]
    ctx.need_x, ctx.need_weights = x.requires_grad, [weight.requires_grad for weight in weights]
    norms, taps = len(means), ctx.constants[1]
    ctx.cancelled = norms - 1 if is_nested(norms, taps) else 0  # β that the batch norm of the sum takes away again
    ctx.affine, ctx.need_gammas = len(gammas), any(gamma.requires_grad for gamma in gammas)


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(x, weights, γs, what forward left but out and variances)."""
    x, *rest = ctx.saved_tensors
    n = len(ctx.need_weights)
    return x, rest[:n], rest[n : n + ctx.affine], rest[n + ctx.affine :]


def _definition(ctx: Any) -> tuple[Callable[[], Tensor], list[Tensor], int]:
    x, weights, gammas, _ = _saved(ctx)
    eps, taps, geometry = ctx.constants[:3]
    branches, normed = unpack_taps(taps), unpack_normed(taps)
    config = config_of(unpack(geometry), branches, eps, normed, ctx.affine, ctx.dtype, x.device.type)
    return functools.partial(config.definition, x, *weights, *gammas), [x, *weights, *gammas], ctx.cancelled
