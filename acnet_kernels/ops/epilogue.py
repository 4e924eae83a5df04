"""What follows a batch-norm sum, as operators: out = act(Σ_b BN_b(y_b) + residual), and its gradient.

    bn_sum_epilogue_forward(ys, gammas, betas, eps, dtype, residual, activation) -> (out, means, variances, rstds)
        bn_sum_forward of ops/bn_sum.py, and in its last pass the residual added and the activation applied.
    bn_sum_epilogue_backward_(grad, ys, means, rstds, gammas, betas, needs_dy, kept, activation, dys, dresidual)
            -> (dgammas, dbeta)
        bn_sum_backward_ of g = grad·act'(z), z being what the activation took; g into `dresidual` if given.

Arguments besides those of ops/bn_sum.py: `residual`, a map of out's shape, dtype and layout, or None; `activation`,
an index of ACTIVATIONS, 0 in forward alone. `kept`: of relu and relu6 out, which tells where they are flat; of
hardswish and silu the residual, or None: z is computed again from the ys and betas. `dresidual` is a map like grad
that shares no memory with anything else. The gradient of the residual without an activation is grad.

The CPU kernels are C++ (csrc/bn_sum.cpp) where the extension is built. On CUDA, maps that Triton's passes take go
through ops/triton_bn_sum.py; of more than MOST_TOGETHER before hardswish or silu only forward. Implementations in
PyTorch serve the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.configs import MOST_TOGETHER
from . import bn_sum, check
from ._extension import LOADED

# csrc/bn_sum.h has the same order.
ACTIVATIONS = ("", "relu", "relu6", "hardswish", "silu")
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}
# Each with the output from which on it is flat: relu nowhere, as not even infinity is at or beyond NaN.
_CLAMPS = {"relu": float("nan"), "relu6": 6.0}

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")

if not LOADED:
    _LIBRARY.define(
        "bn_sum_epilogue_forward(Tensor[] ys, Tensor[] gammas, Tensor[] betas, float[] eps, ScalarType? dtype,"
        " Tensor? residual, int activation) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(
        "bn_sum_epilogue_backward_(Tensor grad, Tensor[] ys, Tensor means, Tensor rstds, Tensor[] gammas,"
        " Tensor[] betas, bool[] needs_dy, Tensor? kept, int activation, Tensor(a!)[] dys, Tensor(b!)? dresidual)"
        " -> (Tensor, Tensor)"
    )

bn_sum_epilogue_forward = torch.ops.acnet_kernels.bn_sum_epilogue_forward.default
bn_sum_epilogue_backward_ = torch.ops.acnet_kernels.bn_sum_epilogue_backward_.default


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation of z, by PyTorch."""
    return _FUNCTIONS[activation](z)


def is_clamp(activation: str) -> bool:
    """Whether the activation's output tells its slope, 0 or 1."""
    return activation in _CLAMPS


def where_steep(grad: Tensor, out: Tensor, activation: str) -> Tensor:
    """grad times the slope of a clamp whose output is out; differentiable in grad."""
    flat = (out <= 0) | (out >= _CLAMPS[activation])
    return grad.masked_fill(flat, 0)


def by_triton(ys: Sequence[Tensor], others: Sequence[Tensor | None], activation: str) -> bool:
    """Whether CUDA maps go through Triton's passes, both ways: `others` are maps besides the ys."""
    smooth = activation != "" and not is_clamp(activation)
    given = [t for t in others if t is not None]
    return bn_sum.triton_takes([*ys, *given]) and not (smooth and len(ys) > MOST_TOGETHER)


def sloped(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """grad times the slope of an activation that is no clamp, at z."""
    if activation == "silu":
        s = z.sigmoid()
        return grad * s * (1 + z * (1 - s))
    return grad * torch.where(z > 3, 1.0, (z / 3 + 0.5).masked_fill(z < -3, 0.0))


def check_activation(activation: int, least: int) -> None:
    """ValueError unless the number is one of ACTIVATIONS from `least` on."""
    if not least <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation must be a number from {least} to {len(ACTIVATIONS) - 1}, got {activation}")


def check_kept(activation: int, kept: Tensor | None) -> None:
    """ValueError where a gradient cannot do without what the activation gave."""
    if kept is None and is_clamp(ACTIVATIONS[activation]):
        raise ValueError("kept must be out, which tells where a clamp is flat, got None")


def _check_outer_map(like: Tensor, dtype: torch.dtype, **given: Tensor | None) -> None:
    check.shape(like.shape, **given)
    check.dtype(dtype, "as out is", **given)


def _check_forward(
    ys: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    dtype: torch.dtype | None,
    residual: Tensor | None,
    activation: int,
) -> None:
    check.one_device(ys=ys, residual=residual)
    bn_sum.check_forward(ys, gammas, betas, eps, dtype)
    _check_outer_map(ys[0], dtype or ys[0].dtype, residual=residual)
    check_activation(activation, 0)


def _check_backward(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    betas: list[Tensor],
    needs_dy: list[bool],
    kept: Tensor | None,
    activation: int,
    dys: list[Tensor],
    dresidual: Tensor | None,
) -> None:
    check.one_device(ys=ys, betas=betas, kept=kept, dresidual=dresidual)
    bn_sum.check_into(grad, ys, means, rstds, gammas, needs_dy, dys)
    bn_sum.check_affine(ys, betas=betas)
    _check_outer_map(ys[0], grad.dtype, kept=kept, dresidual=dresidual)
    check_activation(activation, 1)
    check_kept(activation, kept)


def _check_written(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    betas: list[Tensor],
    needs_dy: list[bool],
    kept: Tensor | None,
    activation: int,
    dys: list[Tensor],
    dresidual: Tensor | None,
) -> None:
    _check_backward(grad, ys, means, rstds, gammas, betas, needs_dy, kept, activation, dys, dresidual)
    bn_sum.check_written(grad, ys, means, rstds, gammas, needs_dy, dys)
    written = check.named({"dys": dys, "dresidual": dresidual})
    check.apart(written, check.named({"grad": grad, "kept": kept, "betas": betas}))
    if dresidual is not None:
        check.apart(
            [("dresidual", dresidual)], check.named({"ys": ys, "gammas": gammas, "means": means, "rstds": rstds})
        )


@check.checked(_check_forward)
def _forward(
    ys: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    dtype: torch.dtype | None,
    residual: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, means, variances, rstds = bn_sum.plain_sum(ys, gammas, betas, eps)
    if residual is not None:
        total += residual
    out = torch.empty_like(ys[0], dtype=dtype).copy_(activate(total, ACTIVATIONS[activation]))
    return out, means, variances, rstds


@check.checked(_check_written)
def _backward_(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    betas: list[Tensor],
    needs_dy: list[bool],
    kept: Tensor | None,
    activation: int,
    dys: list[Tensor],
    dresidual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    name, wide = ACTIVATIONS[activation], bn_sum.accumulation_dtype(grad.dtype)
    if is_clamp(name):
        assert kept is not None
        g = where_steep(grad, kept, name)
    else:
        z = torch.zeros_like(ys[0], dtype=wide) if kept is None else kept.to(wide)
        for b, (y, mean, rstd) in enumerate(zip(ys, means.to(wide), rstds.to(wide), strict=True)):
            scale = rstd * gammas[b] if gammas else rstd
            z = z + (y.to(wide) - mean[:, None, None]) * scale[:, None, None]
            if betas:
                z = z + betas[b][:, None, None]
        g = sloped(grad.to(wide), z, name)
    if dresidual is not None:
        dresidual.copy_(g)
    return bn_sum.backward_into(g, ys, means, rstds, gammas, bn_sum.by_map(dys, needs_dy))


@torch.library.register_fake("acnet_kernels::bn_sum_epilogue_forward")
@check.checked(_check_forward)
def _(
    ys: list[Tensor], gammas: Any, betas: Any, eps: Any, dtype: torch.dtype | None, residual: Any, activation: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return bn_sum.empty_forward(ys, dtype)


@torch.library.register_fake("acnet_kernels::bn_sum_epilogue_backward_")
@check.checked(_check_backward)
def _(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Any,
    gammas: Any,
    betas: Any,
    needs_dy: Any,
    kept: Any,
    activation: Any,
    dys: Any,
    dresidual: Any,
) -> tuple[Tensor, Tensor]:
    return bn_sum.fake_parameters(grad, means)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ys, gammas, betas, _, _, residual, activation = inputs
    out, means, variances, rstds = output
    ctx.mark_non_differentiable(means, variances, rstds)
    ctx.maps, ctx.affine, ctx.activation = len(ys), len(gammas), activation
    ctx.beta_dtypes = [beta.dtype for beta in betas]
    ctx.needs_dy = [y.requires_grad for y in ys]
    ctx.needs_residual = residual is not None and residual.requires_grad
    kept = out if is_clamp(ACTIVATIONS[activation]) else residual
    ctx.save_for_backward(*ys, *gammas, *betas, means, rstds, *(() if kept is None else (kept,)))


def _autograd(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    ys, gammas, rest = saved[: ctx.maps], saved[ctx.maps : ctx.maps + ctx.affine], saved[ctx.maps + ctx.affine :]
    betas, (means, rstds, *kept) = rest[: len(ctx.beta_dtypes)], rest[len(ctx.beta_dtypes) :]
    grad = bn_sum.like(grad, ys[0])
    dr = grad if ctx.needs_residual else None
    if ctx.activation == 0:
        found, dgammas, dbeta = bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, ctx.needs_dy)
    else:
        found = [torch.empty_like(y) for y, need in zip(ys, ctx.needs_dy, strict=True) if need]
        dr = torch.empty_like(grad) if ctx.needs_residual else None
        of_norms = (means, rstds, gammas, betas, ctx.needs_dy, kept[0] if kept else None, ctx.activation)
        dgammas, dbeta = bn_sum_epilogue_backward_(grad, ys, *of_norms, found, dr)
    of_gammas = [d.to(gamma.dtype) for gamma, d in zip(gammas, dgammas, strict=False)]
    dys = bn_sum.by_map(found, ctx.needs_dy)
    return dys, of_gammas, [dbeta.to(dtype) for dtype in ctx.beta_dtypes], None, None, dr, None


torch.library.register_autograd("acnet_kernels::bn_sum_epilogue_forward", _autograd, setup_context=_setup_context)


@check.checked(_check_forward)
def _forward_on_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ys, _, _, _, _, residual, _ = args
    if not bn_sum.triton_takes(ys if residual is None else [*ys, residual]):
        return _forward(*args)
    from . import triton_step  # Triton is slow to import, and only CUDA needs it

    return triton_step.bn_sum_epilogue_forward(*args)


@check.checked(_check_written)
def _backward_on_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    grad, ys, _, _, _, _, _, kept, activation, dys, dresidual = args
    if not by_triton(ys, (grad, kept, *dys, dresidual), ACTIVATIONS[activation]):
        return _backward_(*args)
    from . import triton_step

    return triton_step.bn_sum_epilogue_backward_(*args)


on_cuda = {"bn_sum_epilogue_forward": _forward_on_cuda, "bn_sum_epilogue_backward_": _backward_on_cuda}
for _name, _kernel in on_cuda.items():
    _LIBRARY.impl(_name, _kernel, "CUDA")
if not LOADED:
    _LIBRARY.impl("bn_sum_epilogue_forward", _forward, "CPU")
    _LIBRARY.impl("bn_sum_epilogue_backward_", _backward_, "CPU")
check.refuse_leaves(_LIBRARY, bn_sum_epilogue_backward_)
