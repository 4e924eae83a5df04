"""A direction of a step by Triton in one operator, running statistics included, for what differentiates it itself.

    triton_step_(x, weights, gammas, betas, running_means, running_vars, counters, shifts, momenta, eps, window,
                 residual, activation) -> (out, ys, means, variances, rstds)
        triton_forward (ops/triton_block.py) and what follows it, which moves running statistics besides.
    triton_step_backward_(grad, x, weights, gammas, betas, means, rstds, ys, window, needs_x, needs_weights,
                          overwrite, kept, activation, needs_residual) -> (dxs, dws, dgammas, dbeta, dresiduals)
        Its gradients: dxs holds dx where needs_x, dws those of the weights that need one, dgammas (branches, K) and
        dbeta (K,) are float32; dresiduals holds the residual's where needs_residual. With `overwrite` the y_b are
        written over.
    triton_bn_sum_(ys, gammas, betas, running_means, running_vars, counters, shifts, momenta, eps, dtype, residual,
                   activation) -> (out, means, variances, rstds)
        bn_sum_epilogue_forward (ops/epilogue.py), which moves running statistics besides.

`running_means`, `running_vars`, `counters`, `shifts` and `momenta` are what running.Running.of takes; all are []
where there are none. `residual`, `activation`, `kept` and, which an activation alone needs, `betas` are as in
ops/epilogue.py. Without an activation the residual's gradient is grad, and nobody's to ask for. Nothing here has a
derivative. CUDA, channels_last; under Triton's interpreter, the CPU.

The functions `forward`, `backward` and `bn_sum` are the operators, without the dispatcher's way to them and their
checks where the launches are known (ops/launch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import bn_sum as sums
from . import check, epilogue, launch, triton_block, triton_bn_sum, triton_conv
from .epilogue import ACTIVATIONS
from .running import COUNTERS, NONE, Running
from .triton_bn_sum import ALONE, Following
from .triton_conv import Window

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
_RUNNING = (
    "Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor(c!)[] counters, Tensor[] shifts, float[] momenta"
)
_LIBRARY.define(
    f"triton_step_(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, {_RUNNING}, float[] eps,"
    " int[] window, Tensor? residual, int activation) -> (Tensor, Tensor[], Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "triton_step_backward_(Tensor grad, Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor means,"
    " Tensor rstds, Tensor(a!)[] ys, int[] window, bool needs_x, bool[] needs_weights, bool overwrite,"
    " Tensor? kept, int activation, bool needs_residual) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor[])"
)
_LIBRARY.define(
    f"triton_bn_sum_(Tensor[] ys, Tensor[] gammas, Tensor[] betas, {_RUNNING}, float[] eps, ScalarType? dtype,"
    " Tensor? residual, int activation)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)

triton_step_ = torch.ops.acnet_kernels.triton_step_.default
triton_step_backward_ = torch.ops.acnet_kernels.triton_step_backward_.default
triton_bn_sum_ = torch.ops.acnet_kernels.triton_bn_sum_.default

_KEY = "CPU" if triton_conv.INTERPRETED else "CUDA"
Forward = tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]
Backward = tuple[list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor]]
Sum = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Running,
    eps: Sequence[float],
    window: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "",
) -> Forward:
    """triton_step_."""
    args = (x, weights, gammas, betas)
    routine = triton_block.forward_routine(*args, running, eps, window, residual, activation)
    if found := launch.replay(*routine):
        return _forward_results(found)
    return triton_step_(*args, *running.lists(), eps, window, residual, ACTIVATIONS.index(activation))


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    ys: Sequence[Tensor],
    window: Sequence[int],
    needs_x: bool,
    needs_weights: Sequence[bool],
    overwrite: bool,
    kept: Tensor | None = None,
    activation: str = "",
    needs_residual: bool = False,
) -> Backward:
    """triton_step_backward_."""
    args = (grad, x, weights, gammas, betas, means, rstds, ys, window, needs_x, needs_weights, overwrite, kept)
    if found := launch.replay(*backward_routine(*args, activation, needs_residual)):
        return _backward_results(found, needs_x, needs_residual)
    return triton_step_backward_(*args, ACTIVATIONS.index(activation), needs_residual)


def bn_sum(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Running,
    eps: Sequence[float],
    dtype: torch.dtype | None,
    residual: Tensor | None = None,
    activation: str = "",
) -> Sum:
    """triton_bn_sum_."""
    args = (ys, gammas, betas)
    if found := launch.replay(*sum_routine(*args, running, eps, dtype, residual, activation)):
        return tuple(found)  # type: ignore[return-value]
    return triton_bn_sum_(*args, *running.lists(), eps, dtype, residual, ACTIVATIONS.index(activation))


# ---- The routines.


def _forward_results(results: list[Tensor]) -> Forward:
    out, means, variances, rstds, *ys = results
    return out, ys, means, variances, rstds


def backward_routine(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    ys: Sequence[Tensor],
    window: Sequence[int],
    needs_x: bool,
    needs_weights: Sequence[bool],
    overwrite: bool,
    kept: Tensor | None = None,
    activation: str = "",
    needs_residual: bool = False,
) -> tuple[Any, ...]:
    """launch.run's arguments, for [dγ, dβ, the residual's gradient, dx, every dW], as far as they are needed."""
    tensors = [grad, x, means, rstds, *weights, *ys, *gammas]
    if activation:
        tensors += betas
        if kept is not None:
            tensors.append(kept)
    counts = (len(gammas), len(betas) if activation else 0)
    needs = (needs_x, tuple(needs_weights), needs_residual)
    precision = triton_conv.precision_of(x.dtype)
    return _backward, tensors, counts, tuple(window), needs, overwrite, activation, precision


def _backward(
    tensors: Sequence[Tensor],
    affine: tuple[int, int],
    window: tuple[int, ...],
    needs: tuple[bool, tuple[bool, ...], bool],
    overwrite: bool,
    activation: str,
    precision: str,
) -> list[Tensor]:
    needs_x, needs_weights, needs_residual = needs
    own, branches = Window.unflatten(window), len(needs_weights)
    counts = (4, branches, branches, *affine)
    (grad, x, means, rstds), weights, ys, gammas, betas, rest = launch.split(
        tensors, (*counts, len(tensors) - sum(counts))
    )
    needs_dy = [needs_x or need for need in needs_weights]
    targets = [y if overwrite else launch.empty_like(y) for y, need in zip(ys, needs_dy, strict=True) if need]
    dresiduals = [launch.empty_like(grad)] if needs_residual else []
    following = Following(activation, betas, rest[0] if rest else None, *dresiduals)
    dgammas, dbeta = triton_bn_sum.bn_sum_backward_(grad, ys, means, rstds, gammas, needs_dy, targets, following)
    results = [dgammas, dbeta, *dresiduals]
    if needs_x:
        rows, columns = x.shape[2:]
        results.append(triton_conv.input_grad(targets, weights, own, (rows, columns)))
    chosen = [b for b, need in enumerate(needs_weights) if need]
    if chosen:
        dys = [targets[b] for b in chosen] if needs_x else targets
        results += triton_conv.weight_grads(x, dys, [weights[b] for b in chosen], own.only(chosen))
    return results


def _backward_results(results: list[Tensor], needs_x: bool, needs_residual: bool) -> Backward:
    dgammas, dbeta, *rest = results
    dresiduals, rest = rest[:needs_residual], rest[needs_residual:]
    return rest[:needs_x], rest[needs_x:], dgammas, dbeta, dresiduals


def sum_routine(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Running,
    eps: Sequence[float],
    dtype: torch.dtype | None,
    residual: Tensor | None = None,
    activation: str = "",
) -> tuple[Any, ...]:
    """triton_bn_sum_'s arguments as launch.run and replay take them; the results are the operator's."""
    means, variances, counters, shifts, momenta = running
    tensors = [*ys, *gammas, *betas, *means, *variances, *counters, *shifts]
    counts = (len(ys), len(gammas), len(betas), len(means), len(shifts))
    if residual is not None:
        tensors.append(residual)
    return _sum, tensors, counts, tuple(momenta), tuple(eps), dtype, activation


def _sum(
    tensors: Sequence[Tensor],
    counts: tuple[int, ...],
    momenta: tuple[float | None, ...],
    eps: tuple[float, ...],
    dtype: torch.dtype | None,
    activation: str,
) -> list[Tensor]:
    maps, gammas, betas, norms, shifts = counts
    counts = (maps, gammas, betas, norms, norms, norms, shifts)
    ys, scales, offsets, means, variances, counters, moved, rest = launch.split(
        tensors, (*counts, len(tensors) - sum(counts))
    )
    following = (Running(means, variances, counters, moved, momenta), rest[0] if rest else None, activation)
    return list(triton_bn_sum.bn_sum_forward(ys, scales, offsets, eps, dtype, *following))


def sum_backward_routine(
    grad: Tensor,
    ys: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: Sequence[Tensor],
    needs_dy: Sequence[bool],
    dys: Sequence[Tensor],
    following: Following = ALONE,
) -> tuple[Any, ...]:
    """launch.run's arguments, for [dγ, dβ] and, where there are no `dys` and nothing follows, every dy needed."""
    activation, betas, kept, dresidual = following
    tensors = [grad, means, rstds, *ys, *dys, *gammas, *betas]
    tensors += [t for t in (kept, dresidual) if t is not None]
    counts = (3, len(ys), len(dys), len(gammas), len(betas), int(kept is not None), int(dresidual is not None))
    return _sum_backward, tensors, counts, tuple(needs_dy), activation


def _sum_backward(
    tensors: Sequence[Tensor], counts: tuple[int, ...], needs_dy: tuple[bool, ...], activation: str
) -> list[Tensor]:
    (grad, means, rstds), ys, dys, gammas, betas, kept, dresiduals = launch.split(tensors, counts)
    args = (grad, ys, means, rstds, gammas, needs_dy)
    if dys or activation:
        following = Following(activation, betas, kept[0] if kept else None, *dresiduals)
        return list(triton_bn_sum.bn_sum_backward_(*args, dys, following))
    dys, dgammas, dbeta = triton_bn_sum.bn_sum_backward(*args)
    return [dgammas, dbeta, *dys]


# What ops/bn_sum.py registers for maps that `triton_takes`.
def bn_sum_statistics(ys: Sequence[Tensor], eps: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of this name."""
    with torch.cuda.device_of(ys[0]):  # Triton launches on the current device
        norms = triton_bn_sum.merge_statistics(triton_bn_sum.statistics(ys), [], [], eps)
    return norms.means, norms.variances, norms.rstds


def bn_sum_forward(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    dtype: torch.dtype | None,
) -> Sum:
    """The operator of this name."""
    return tuple(launch.run(*sum_routine(ys, gammas, betas, NONE, eps, dtype)))  # type: ignore[return-value]


def bn_sum_backward(
    grad: Tensor,
    ys: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: Sequence[Tensor],
    needs_dy: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The operator of this name."""
    dgammas, dbeta, *dys = launch.run(*sum_backward_routine(grad, ys, means, rstds, gammas, needs_dy, []))
    return dys, dgammas, dbeta


def bn_sum_backward_(
    grad: Tensor,
    ys: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: Sequence[Tensor],
    needs_dy: Sequence[bool],
    dys: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The operator of this name."""
    dgammas, dbeta, *_ = launch.run(*sum_backward_routine(grad, ys, means, rstds, gammas, needs_dy, dys))
    return dgammas, dbeta


# What ops/epilogue.py registers for maps that `triton_takes`.
def bn_sum_epilogue_forward(
    ys: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    dtype: torch.dtype | None,
    residual: Tensor | None,
    activation: int,
) -> Sum:
    """The operator of this name."""
    routine = sum_routine(ys, gammas, betas, NONE, eps, dtype, residual, ACTIVATIONS[activation])
    return tuple(launch.run(*routine))  # type: ignore[return-value]


def bn_sum_epilogue_backward_(
    grad: Tensor,
    ys: Sequence[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    needs_dy: Sequence[bool],
    kept: Tensor | None,
    activation: int,
    dys: Sequence[Tensor],
    dresidual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator of this name."""
    following = Following(ACTIVATIONS[activation], betas, kept, dresidual)
    dgammas, dbeta = launch.run(*sum_backward_routine(grad, ys, means, rstds, gammas, needs_dy, dys, following))
    return dgammas, dbeta


# ---- The operators.


def _check_running(K: int, norms: int, running: Running) -> None:
    means, variances, counters, shifts, momenta = running
    lists = {"running_vars": variances, "counters": counters, "momenta": momenta}
    if means:
        check.length(norms, "one a batch norm, or none", running_means=means)
    check.length(len(means), "as running_means", **lists)
    if shifts:
        check.length(len(means), "as running_means, or none", shifts=shifts)
    vectors = {"running_means": means, "running_vars": variances, "shifts": shifts}
    check.shape((K,), **vectors)
    check.floats(**vectors)
    check.contiguous(**vectors)
    for i, counter in enumerate(counters):
        if counter.dtype not in COUNTERS or counter.numel() != 1:
            raise ValueError(
                f"counters[{i}] must be one number of a dtype in {COUNTERS}, got {counter.dtype} of shape "
                f"{tuple(counter.shape)}"
            )


def _check_apart(running: Running, **read: Any) -> None:
    """What is written shares no memory with anything; where there is memory."""
    means, variances, counters, *_ = running
    lists = {"running_means": means, "running_vars": variances, "counters": counters}
    check.apart(check.named(lists), check.named({**read, "shifts": running.shifts}))


def _check_following(like: Tensor, shape: Sequence[int], dtype: torch.dtype, activation: int, **given: Any) -> None:
    """What follows the sum is one of ACTIVATIONS, and `given`, maps or None, are like the output."""
    check.one_device(like=like, **given)
    epilogue.check_activation(activation, 0)
    check.shape(shape, **given)
    check.dtype(dtype, "as out is", **given)


def _check_forward(
    x: Tensor, weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor],
    running_means: list[Tensor], running_vars: list[Tensor], counters: list[Tensor], shifts: list[Tensor],
    momenta: list[float], eps: list[float], window: list[int], residual: Tensor | None, activation: int,
) -> None:  # fmt: skip
    lists = {"running_means": running_means, "running_vars": running_vars, "counters": counters, "shifts": shifts}
    check.one_device(x=x, **lists)
    triton_block.check_forward(x, weights, gammas, betas, eps, window)
    running = Running.of(running_means, running_vars, counters, shifts, momenta)
    _check_running(weights[0].shape[0], len(weights), running)
    # What is worked out of shapes is kept elsewhere: not here again where nothing is to be compared.
    shape = () if residual is None else triton_block.output_shape(x.shape, weights, window)
    _check_following(x, shape, x.dtype, activation, residual=residual)


@torch.library.impl(_LIBRARY, "triton_step_", _KEY)
@check.checked(_check_forward)
def run_forward(
    x: Tensor, weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor],
    running_means: list[Tensor], running_vars: list[Tensor], counters: list[Tensor], shifts: list[Tensor],
    momenta: list[float], eps: list[float], window: list[int], residual: Tensor | None, activation: int,
) -> Forward:  # fmt: skip
    running = Running.of(running_means, running_vars, counters, shifts, momenta)
    args = (x, weights, gammas, betas, running, eps, window, residual, ACTIVATIONS[activation])
    _check_apart(running, x=x, weights=weights, gammas=gammas, betas=betas, residual=residual)
    return _forward_results(launch.run(*triton_block.forward_routine(*args)))


@torch.library.register_fake("acnet_kernels::triton_step_")
@check.checked(_check_forward)
def _(x: Tensor, weights: Any, gammas: Any, betas: Any, *rest: Any) -> Forward:
    *_, eps, window, _, _ = rest
    return triton_block.empty_forward(x, weights, eps, window)


def _check_backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor], means: Tensor,
    rstds: Tensor, ys: list[Tensor], window: list[int], needs_x: bool, needs_weights: list[bool], overwrite: bool,
    kept: Tensor | None, activation: int, needs_residual: bool,
) -> None:  # fmt: skip
    check.one_device(grad=grad, x=x, weights=weights, gammas=gammas, betas=betas, means=means, rstds=rstds, ys=ys)
    check.maps(grad=grad, x=x)
    triton_block.check_weights(weights, window)
    check.length(len(weights), "one a branch", ys=ys, needs_weights=needs_weights)
    check.dtype(x.dtype, "as x", weights=weights, ys=ys)
    for name, vectors in (("gammas", gammas), ("betas", betas)):
        if vectors:
            check.length(len(weights), "one a branch, or none", **{name: vectors})
    check.shape(weights[0].shape[:1], gammas=gammas, betas=betas)
    check.floats(gammas=gammas, betas=betas)
    _check_following(grad, grad.shape, grad.dtype, activation, kept=kept)
    epilogue.check_kept(activation, kept)
    if needs_residual and activation == 0:
        raise ValueError("needs_residual must be False without an activation: the residual's gradient is grad")
    check.shape((len(weights), weights[0].shape[0]), means=means, rstds=rstds)
    check.dtype(torch.float64, "as triton_step_ returns them", means=means, rstds=rstds)
    check.contiguous(means=means, rstds=rstds)


@torch.library.impl(_LIBRARY, "triton_step_backward_", _KEY)
@check.checked(_check_backward)
def run_backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor], means: Tensor,
    rstds: Tensor, ys: list[Tensor], window: list[int], needs_x: bool, needs_weights: list[bool], overwrite: bool,
    kept: Tensor | None, activation: int, needs_residual: bool,
) -> Backward:  # fmt: skip
    if overwrite:
        read = {"grad": grad, "x": x, "weights": weights, "gammas": gammas, "means": means, "rstds": rstds}
        check.apart(check.named({"ys": ys}), check.named({**read, "betas": betas, "kept": kept}))
    args = (grad, x, weights, gammas, betas, means, rstds, ys, window, needs_x, needs_weights, overwrite, kept)
    found = launch.run(*backward_routine(*args, ACTIVATIONS[activation], needs_residual))
    return _backward_results(found, needs_x, needs_residual)


@torch.library.register_fake("acnet_kernels::triton_step_backward_")
@check.checked(_check_backward)
def _(
    grad: Tensor, x: Tensor, weights: list[Tensor], gammas: Any, betas: Any, means: Tensor, rstds: Any,
    ys: Any, window: Any, needs_x: bool, needs_weights: list[bool], overwrite: bool, kept: Any, activation: Any,
    needs_residual: bool,
) -> Backward:  # fmt: skip
    # Where a kernel runs, triton_conv checks this, and keeps what it worked out.
    check.shape(triton_block.output_shape(x.shape, weights, window), grad=grad, ys=ys)
    dgammas = torch.empty_like(means, dtype=torch.float32)
    dxs = [torch.empty_like(x, memory_format=torch.channels_last)] if needs_x else []
    dws = [torch.empty_like(w) for w, need in zip(weights, needs_weights, strict=True) if need]
    dresiduals = [torch.empty_like(grad, memory_format=torch.channels_last)] if needs_residual else []
    return dxs, dws, dgammas, dgammas.new_empty(means.shape[1]), dresiduals


def _check_sum(
    ys: list[Tensor], gammas: list[Tensor], betas: list[Tensor], running_means: list[Tensor],
    running_vars: list[Tensor], counters: list[Tensor], shifts: list[Tensor], momenta: list[float],
    eps: list[float], dtype: torch.dtype | None, residual: Tensor | None, activation: int,
) -> None:  # fmt: skip
    lists = {"running_means": running_means, "running_vars": running_vars, "counters": counters, "shifts": shifts}
    check.one_device(ys=ys, **lists)
    sums.check_forward(ys, gammas, betas, eps, dtype)
    check.dtype(ys[0].dtype if ys[0].dtype != torch.float64 else torch.float32, "for Triton", ys=ys)
    _check_running(ys[0].shape[1], len(ys), Running.of(running_means, running_vars, counters, shifts, momenta))
    _check_following(ys[0], ys[0].shape, dtype or ys[0].dtype, activation, residual=residual)


@torch.library.impl(_LIBRARY, "triton_bn_sum_", _KEY)
@check.checked(_check_sum)
def run_bn_sum(
    ys: list[Tensor], gammas: list[Tensor], betas: list[Tensor], running_means: list[Tensor],
    running_vars: list[Tensor], counters: list[Tensor], shifts: list[Tensor], momenta: list[float],
    eps: list[float], dtype: torch.dtype | None, residual: Tensor | None, activation: int,
) -> Sum:  # fmt: skip
    running = Running.of(running_means, running_vars, counters, shifts, momenta)
    _check_apart(running, ys=ys, gammas=gammas, betas=betas, residual=residual)
    routine = sum_routine(ys, gammas, betas, running, eps, dtype, residual, ACTIVATIONS[activation])
    return tuple(launch.run(*routine))  # type: ignore[return-value]


@torch.library.register_fake("acnet_kernels::triton_bn_sum_")
@check.checked(_check_sum)
def _(
    ys: list[Tensor], gammas: Any, betas: Any, running_means: Any, running_vars: Any, counters: Any, shifts: Any,
    momenta: Any, eps: Any, dtype: torch.dtype | None, residual: Any, activation: Any,
) -> Sum:  # fmt: skip
    return sums.empty_forward(ys, dtype)


for _operator in (triton_step_, triton_step_backward_, triton_bn_sum_):
    check.refuse_leaves(_LIBRARY, _operator)
