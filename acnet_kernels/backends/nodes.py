"""A step by an operator as one node of autograd's graph; the definition's gradients where the step's will not do.

The running statistics move within the node, as within nn.BatchNorm2d's: a recomputation that stops as soon as all
that backward needs is there again (torch.utils.checkpoint) has moved them by then. torch.library's own nodes cannot
do that, and take ten times as long to make; torch.compile, which needs them, gets them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import below_autograd, is_batched, is_differentiated_by_transform, is_legacy_batched
from ..ops.bn_sum import accumulation_dtype
from ..ops.epilogue import activate, is_clamp, where_steep
from ..spec import has_tangent
from ..steps.recorded import Recorded

# Moves the running statistics, given the batch's means and biased variances.
Update = Callable[[Tensor, Tensor], None]


def run(recorded: Recorded, arguments: tuple[Any, ...], update: Update) -> Tensor:
    """out of the operator on these arguments, differentiable in the first four, and in the residual."""
    if not torch.compiler.is_compiling():
        return _Node.apply(recorded, arguments, update, *_flat(recorded, arguments))[0]
    out, means, variances, *_ = recorded.operator(*arguments)
    with torch.no_grad():
        update(means, variances)
    return out


def _flat(recorded: Recorded, arguments: tuple[Any, ...]) -> list[Any]:
    flat: list[Any] = []
    for argument in arguments[:4]:
        flat.extend(argument if isinstance(argument, list) else (argument,))
    return [*flat, arguments[-2]] if recorded.finishes else flat


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorded: Recorded, arguments: tuple[Any, ...], update: Update, *_: Tensor
    ) -> tuple[Tensor, ...]:
        with below_autograd():
            output = recorded.operator(*arguments)
        update(output[1], output[2])
        recorded.setup(ctx, arguments, output)
        ctx.recorded = recorded
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        if wants_definition(grad):
            by = ctx.recorded.definition(ctx)
            if by.after is None:
                return None, None, None, *gradients(by.function, by.inputs, needs[3:], grad, by.cancelled)
            finished = finished_gradients(
                by.function, by.inputs, needs[3:], grad, by.activation, by.after, by.cancelled
            )
            return None, None, None, *finished
        return None, None, None, *_flat(ctx.recorded, ctx.recorded.backward(ctx, grad))


def wants_definition(grad: Tensor) -> bool:
    """Whether only the definition's gradients will do: differentiable ones, or of a batch of grads at once.

    Raises:
        RuntimeError: a torch.func transform differentiates the gradient of a step taken outside it.
    """
    if torch.compiler.is_compiling():  # Dynamo knows what grad is, and cannot ask
        return torch.is_grad_enabled()
    if is_differentiated_by_transform(grad):
        raise RuntimeError(
            "a torch.func transform cannot differentiate the gradient of a block's step taken outside it: call the "
            "block inside the transform, or use backend='eager'"
        )
    batched = is_batched(grad) or is_legacy_batched(grad)
    return batched or has_tangent(grad) or torch.is_grad_enabled()


def gradients(
    definition: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grad: Tensor,
    cancelled: int = 0,
) -> list[Tensor | None]:
    """The gradients of x, the weights and the γs, the inputs of definition, and of as many βs as needs has left.

    Those of the first `cancelled` βs are 0: what follows them takes them away again.
    """
    wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
    with without_autocast(grad.device.type):
        found: Iterator[Tensor] = iter(())
        if wanted:
            with torch.enable_grad():
                out = definition()
            create = torch.is_grad_enabled()
            found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=create))
        dbeta = grad.to(accumulation_dtype(grad.dtype)).sum((0, 2, 3))
    own, of_betas = needs[: len(inputs)], needs[len(inputs) :]
    dbetas = [torch.zeros_like(dbeta) if b < cancelled else dbeta for b in range(len(of_betas))]
    return [
        *(next(found) if need else None for need in own),
        *(d if need else None for d, need in zip(dbetas, of_betas, strict=True)),
    ]


def finished_gradients(
    definition: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grad: Tensor,
    activation: str,
    after: Sequence[Tensor | None],
    cancelled: int = 0,
) -> list[Tensor | None]:
    """gradients() of act(definition() + Σβ + residual), and then the residual's.

    Args:
        definition, inputs: as gradients() has them.
        needs: of the inputs, the βs and the residual.
        grad: of the activation's output.
        activation: its name, '' for none.
        after: before an activation the βs and, of a clamp, its output, else the residual, None for none.
        cancelled: as gradients() has it.
    """
    *needs_tensors, needs_residual = needs
    if not activation or is_clamp(activation):
        if activation:
            assert after[-1] is not None
            grad = where_steep(grad, after[-1], activation)
        return [*gradients(definition, inputs, needs_tensors, grad, cancelled), grad if needs_residual else None]
    residual = after[-1]
    betas = [beta for beta in after[:-1] if beta is not None]
    without = range(len(inputs), len(inputs) + cancelled)  # of the needs: their gradients are zeros
    sources = [*inputs, *betas, *([] if residual is None else [residual])]
    is_wanted = [need and i not in without for i, need in enumerate(needs)]
    wanted = [t for t, need in zip(sources, is_wanted, strict=False) if need]
    with without_autocast(grad.device.type), torch.enable_grad():
        z = definition() + sum(betas[cancelled:], torch.zeros_like(inputs[0][0, 0, 0, 0]))[..., None, None]
        out = activate(z if residual is None else z + residual, activation)
    with without_autocast(grad.device.type):
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=torch.is_grad_enabled()))
    of_others = [
        torch.zeros_like(beta) if need else None
        for beta, need in zip(betas[:cancelled], needs[len(inputs) :], strict=False)
    ]
    results = [next(found) if need else None for need in is_wanted]
    return [*results[: len(inputs)], *of_others, *results[len(inputs) + cancelled :]]


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Autocast off: the casts are made by hand, and it would undo the wider convolution."""
    casts = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if casts else contextlib.nullcontext()
