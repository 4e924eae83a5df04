"""Batch-norm sums, out = Σ_b BN_b(y_b) by the batch's own statistics, and their gradient, as operators.

    bn_sum_forward(ys, gammas, betas, eps, dtype) -> (out, means, variances, rstds)
        out = Σ_b γ_b·(y_b − μ_b)·rstd_b + β_b, in the layout of ys, and in `dtype`: None for theirs.
    bn_sum_backward(grad, ys, means, rstds, gammas, needs_dy) -> (dys, dgammas, dbeta)
        dys holds dy_b for every b with needs_dy[b], in order, in the dtype and layout of ys. Every branch's dβ is
        the same Σ grad, hence one dbeta.
    bn_sum_backward_(grad, ys, means, rstds, gammas, needs_dy, dys) -> (dgammas, dbeta)
        The same, written into `dys`, one for every b with needs_dy[b], in order: y_b itself, whose memory it takes,
        or a map that shares no memory with anything else, as for a y_b that is needed still.

Arguments: `ys`, 1 to 8 maps N×K×H×W of one shape, dtype (float32, float64, bfloat16, float16) and layout (all
contiguous or all channels_last); `gammas` and `betas`, one (K,) a map, or [] for γ = 1 and β = 0; `eps`, a float a
map; `dtype`, bfloat16 or float16 for float32 ys; `grad` like out. `means`, `variances` (biased) and `rstds` are
(len(ys), K) float64: float32 would round away the deviation of a map whose mean is far larger. `dgammas` is
(len(ys), K) and `dbeta` (K,), float64 for float64 maps, float32 otherwise.
Running statistics are the caller's (steps/batchnorm.py); a variance far below ε cannot be had from rstd.

With ŷ_b = (y_b − μ_b)·rstd_b, M = N·H·W and g = grad:
    dβ = Σ g,   dγ_b = Σ g·ŷ_b,   dy_b = γ_b·rstd_b·(g − dβ/M − ŷ_b·dγ_b/M).
The CPU kernels are C++ (csrc/bn_sum.cpp) where the extension is built: per-chunk means and M2 merged by Chan's rule
in a fixed order, the same bits for any number of threads. On CUDA, channels_last maps but float64 ones go through
ops/triton_bn_sum.py where Triton is installed. The implementation in PyTorch, below, serves the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import suggest_memory_format
from . import check
from ._extension import LOADED, TRITON

_LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")

if not LOADED:
    _COMMON = "Tensor means, Tensor rstds, Tensor[] gammas, bool[] needs_dy"
    _LIBRARY.define(
        "bn_sum_forward(Tensor[] ys, Tensor[] gammas, Tensor[] betas, float[] eps, ScalarType? dtype)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(f"bn_sum_backward(Tensor grad, Tensor[] ys, {_COMMON}) -> (Tensor[], Tensor, Tensor)")
    _LIBRARY.define(f"bn_sum_backward_(Tensor grad, Tensor[] ys, {_COMMON}, Tensor(a!)[] dys) -> (Tensor, Tensor)")

MOST_MAPS = 8

bn_sum_forward = torch.ops.acnet_kernels.bn_sum_forward.default
bn_sum_backward = torch.ops.acnet_kernels.bn_sum_backward.default
bn_sum_backward_ = torch.ops.acnet_kernels.bn_sum_backward_.default


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over maps of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(ys: Sequence[Tensor]) -> None:
    if not 1 <= len(ys) <= MOST_MAPS:
        raise ValueError(f"ys must hold 1 to {MOST_MAPS} maps, got {len(ys)}")
    if ys[0].dim() != 4 or ys[0].numel() == 0:
        raise ValueError(f"ys must be non-empty N×K×H×W maps, got shape {tuple(ys[0].shape)}")
    check.floats(ys=ys[:1])
    _check_like(ys[0], ys=ys)


def _check_like(y: Tensor, **lists: Sequence[Tensor]) -> None:
    for name, maps in lists.items():
        for i, t in enumerate(maps):
            if t.shape != y.shape or t.dtype != y.dtype:
                raise ValueError(
                    f"{name}[{i}] must agree in shape and dtype with ys[0], {y.dtype} of {tuple(y.shape)}, "
                    f"got {t.dtype} of {tuple(t.shape)}"
                )


def _check_outer(y: Tensor, dtype: torch.dtype) -> None:
    if dtype != y.dtype and not (y.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
        raise ValueError(
            f"out and grad must have the dtype of ys, {y.dtype}, or bfloat16 or float16 where ys are float32, "
            f"got {dtype}"
        )


def rstds_of(variances: Tensor, eps: Sequence[float]) -> Tensor:
    """1/√(σ²+ε), B×K, and 0 where that is 1/0, as in nn.BatchNorm2d; eps: B floats."""
    # No tensor of eps: its copy would have the host wait for a CUDA device.
    spread = torch.stack([variance + e for variance, e in zip(variances, eps, strict=True)])
    return spread.rsqrt().masked_fill(spread == 0, 0) if 0.0 in eps else spread.rsqrt()


def mean_and_variance(y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of each channel of a map, (K,) each.

    Of y's dtype; on the CPU float64 where that overflows or y is not finite: only a plain sum says whether the mean
    is infinite or NaN, as in nn.BatchNorm2d. A GPU would have to be waited for, and a graph would depend on it.
    """
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    if not y.is_cpu or torch.compiler.is_compiling() or variance.isfinite().all():
        return mean, variance
    y = y.double()
    mean = y.mean((0, 2, 3))
    return mean, (y - _per_channel(mean)).square().mean((0, 2, 3))


def check_affine(ys: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    """ValueError unless each list holds one (K,) of floats a map, or nothing."""
    for name, values in lists.items():
        if values:
            check.length(len(ys), "one a map, or none", **{name: values})
    check.shape(ys[0].shape[1:2], **lists)
    check.floats(**lists)


def _check_statistics(ys: list[Tensor], eps: list[float]) -> None:
    check.one_device(ys=ys)
    _check(ys)
    check.length(len(ys), "one a map", eps=eps)


def check_forward(
    ys: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    dtype: torch.dtype | None,
) -> None:
    """ValueError where bn_sum_forward's arguments do not fit each other; the message names one."""
    check.one_device(ys=ys, gammas=gammas, betas=betas)
    _check_statistics(ys, eps)
    _check_outer(ys[0], ys[0].dtype if dtype is None else dtype)
    check_affine(ys, gammas=gammas, betas=betas)


def check_backward(
    grad: Tensor, ys: list[Tensor], means: Tensor, rstds: Tensor, gammas: list[Tensor], needs_dy: list[bool]
) -> None:
    """ValueError where bn_sum_backward's arguments do not fit each other; the message names one."""
    check.one_device(ys=ys, grad=grad, means=means, rstds=rstds, gammas=gammas)
    _check(ys)
    if grad.shape != ys[0].shape:
        raise ValueError(f"grad must agree with ys in shape, got {tuple(grad.shape)}, ys have {tuple(ys[0].shape)}")
    _check_outer(ys[0], grad.dtype)
    check_affine(ys, gammas=gammas)
    check.length(len(ys), "one a map", needs_dy=needs_dy)
    check.shape((len(ys), ys[0].shape[1]), means=means, rstds=rstds)
    check.dtype(torch.float64, "as bn_sum_forward returns them", means=means, rstds=rstds)
    check.contiguous(means=means, rstds=rstds)


def check_into(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    needs_dy: list[bool],
    dys: list[Tensor],
) -> None:
    """ValueError where bn_sum_backward_'s arguments do not fit each other, but for memory."""
    check.one_device(ys=ys, dys=dys)
    check_backward(grad, ys, means, rstds, gammas, needs_dy)
    check.length(sum(needs_dy), "one for each true one of needs_dy", dys=dys)
    _check_like(ys[0], dys=dys)


def check_written(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    needs_dy: list[bool],
    dys: list[Tensor],
) -> None:
    """ValueError where bn_sum_backward_'s arguments do not fit each other, or share memory that is written."""
    check_into(grad, ys, means, rstds, gammas, needs_dy, dys)
    written = [(f"dys[{i}]", dy) for i, dy in enumerate(dys)]
    for name, dy in written:
        if not (dy.is_contiguous() or dy.is_contiguous(memory_format=torch.channels_last)):
            raise ValueError(f"{name} must be contiguous or channels_last, got strides {dy.stride()}")
    read = [("grad", grad), ("means", means), ("rstds", rstds)]
    read += [(f"gammas[{b}]", gamma) for b, gamma in enumerate(gammas)]
    for b, (y, target) in enumerate(zip(ys, by_map(dys, needs_dy), strict=True)):
        if target is None or (target.data_ptr(), target.stride()) != (y.data_ptr(), y.stride()):
            read.append((f"ys[{b}]", y))
    check.apart(written, read)


def by_map(dys: Sequence[Tensor], needs_dy: Sequence[bool]) -> list[Tensor | None]:
    """dys with None for the maps that need none."""
    given = iter(dys)
    return [next(given) if need else None for need in needs_dy]


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


@check.checked(_check_statistics)
def plain_statistics(ys: list[Tensor], eps: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(means, variances, rstds) as bn_sum_forward returns them, in PyTorch."""
    found = [mean_and_variance(y.to(accumulation_dtype(y.dtype))) for y in ys]
    means, variances = (torch.stack([t.double() for t in all_of]) for all_of in zip(*found, strict=True))
    return means, variances, rstds_of(variances, eps)


@check.checked(check_forward)
def _forward(
    ys: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: list[float],
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, means, variances, rstds = plain_sum(ys, gammas, betas, eps)
    return total.to(ys[0].dtype if dtype is None else dtype), means, variances, rstds


def plain_sum(
    ys: list[Tensor], gammas: list[Tensor], betas: list[Tensor], eps: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bn_sum_forward in PyTorch, its out of the dtype that sums are computed in."""
    dtype = accumulation_dtype(ys[0].dtype)
    means, variances, rstds = plain_statistics(ys, eps)
    total = torch.zeros_like(ys[0], dtype=dtype)
    for b, y in enumerate(ys):
        scale = (rstds[b] * gammas[b] if gammas else rstds[b]).to(dtype)
        total.addcmul_(y.to(dtype) - _per_channel(means[b].to(dtype)), _per_channel(scale))
        if betas:
            total += _per_channel(betas[b])
    return total, means, variances, rstds


def backward_into(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    targets: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """(dγ of every map, dβ) in PyTorch; dy_b into targets[b] where that is not None."""
    dtype = accumulation_dtype(grad.dtype)
    means, rstds, g = means.to(dtype), rstds.to(dtype), grad.to(dtype)
    count = grad.numel() // grad.shape[1]
    dbeta = g.sum((0, 2, 3))
    g_centred = g - _per_channel(dbeta / count)
    dgammas = []
    for b, (y, mean, rstd, target) in enumerate(zip(ys, means, rstds, targets, strict=True)):
        normed = (y.to(dtype) - _per_channel(mean)) * _per_channel(rstd)
        dgamma = (g * normed).sum((0, 2, 3))
        dgammas.append(dgamma)
        if target is not None:
            scale = rstd * gammas[b] if gammas else rstd
            target.copy_(_per_channel(scale) * (g_centred - normed * _per_channel(dgamma / count)))
    return torch.stack(dgammas), dbeta


def _empty_dys(ys: Sequence[Tensor], needs_dy: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(y) for y, need in zip(ys, needs_dy, strict=True) if need]


@check.checked(check_backward)
def _backward(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    needs_dy: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    dys = _empty_dys(ys, needs_dy)
    return dys, *backward_into(grad, ys, means, rstds, gammas, by_map(dys, needs_dy))


@check.checked(check_written)
def _backward_(
    grad: Tensor,
    ys: list[Tensor],
    means: Tensor,
    rstds: Tensor,
    gammas: list[Tensor],
    needs_dy: list[bool],
    dys: list[Tensor],
) -> tuple[Tensor, Tensor]:
    return backward_into(grad, ys, means, rstds, gammas, by_map(dys, needs_dy))


def triton_takes(maps: Sequence[Tensor]) -> bool:
    """Whether CUDA maps go through Triton's passes."""
    layout = all(t.is_contiguous(memory_format=torch.channels_last) for t in maps)
    return TRITON and layout and maps[0].dtype != torch.float64


def _on_cuda(name: str, plain: Callable[..., Any], checks: Callable[..., None]) -> Callable[..., Any]:
    """An operator's CUDA kernel: Triton's where it takes the maps, else the one in PyTorch."""

    @check.checked(checks)
    def kernel(*args: Any) -> Any:
        maps = args[0] if name in ("bn_sum_forward", "bn_sum_statistics") else [args[0], *args[1]]
        maps += args[6] if name == "bn_sum_backward_" else []
        if not triton_takes(maps):
            return plain(*args)
        from . import triton_step  # Triton is slow to import, and only CUDA needs it

        return getattr(triton_step, name)(*args)

    return kernel


statistics_on_cuda = _on_cuda("bn_sum_statistics", plain_statistics, _check_statistics)  # bn_sum_forward's
on_cuda = {
    "bn_sum_forward": _on_cuda("bn_sum_forward", _forward, check_forward),
    "bn_sum_backward": _on_cuda("bn_sum_backward", _backward, check_backward),
    "bn_sum_backward_": _on_cuda("bn_sum_backward_", _backward_, check_written),
}
for _name, _kernel in on_cuda.items():
    _LIBRARY.impl(_name, _kernel, "CUDA")
if not LOADED:
    _LIBRARY.impl("bn_sum_forward", _forward, "CPU")
    _LIBRARY.impl("bn_sum_backward", _backward, "CPU")
    _LIBRARY.impl("bn_sum_backward_", _backward_, "CPU")


def empty_statistics(ys: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and rstds as bn_sum_forward returns them, unwritten."""
    shape = len(ys), ys[0].shape[1]
    means, variances, rstds = (ys[0].new_empty(shape, dtype=torch.float64) for _ in range(3))
    return means, variances, rstds


@torch.library.register_fake("acnet_kernels::bn_sum_forward")
@check.checked(check_forward)
def _(
    ys: list[Tensor], gammas: Any, betas: Any, eps: Any, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_forward(ys, dtype)


def empty_forward(ys: list[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What bn_sum_forward returns, unwritten."""
    return torch.empty_like(ys[0], dtype=dtype), *empty_statistics(ys)


def fake_parameters(grad: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """(dgammas, dbeta) as the gradients return them, unwritten."""
    dgammas = torch.empty_like(means, dtype=accumulation_dtype(grad.dtype))
    return dgammas, dgammas.new_empty(means.shape[1])


@torch.library.register_fake("acnet_kernels::bn_sum_backward")
@check.checked(check_backward)
def _(
    grad: Tensor, ys: list[Tensor], means: Tensor, rstds: Tensor, gammas: Any, needs_dy: list[bool]
) -> tuple[list[Tensor], Tensor, Tensor]:
    return _empty_dys(ys, needs_dy), *fake_parameters(grad, means)


@torch.library.register_fake("acnet_kernels::bn_sum_backward_")
@check.checked(check_into)
def _(
    grad: Tensor, ys: Any, means: Tensor, rstds: Tensor, gammas: Any, needs_dy: Any, dys: Any
) -> tuple[Tensor, Tensor]:
    return fake_parameters(grad, means)


def like(grad: Tensor, y: Tensor) -> Tensor:
    """grad in y's memory layout, as bn_sum_backward takes it; grad itself where it is so already."""
    layout = torch.channels_last if is_channels_last(y) else torch.contiguous_format
    return grad.contiguous(memory_format=layout)


def is_channels_last(y: Tensor) -> bool:
    """Whether y is channels_last and not contiguous as well."""
    if y.is_contiguous():
        return False
    # Under torch 2.10 and 2.11 a map of symbolic sizes denies its layout, and only its strides tell.
    return y.is_contiguous(memory_format=torch.channels_last) or suggest_memory_format(y) == torch.channels_last


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ys, gammas, betas, _, _ = inputs
    _, means, variances, rstds = output
    ctx.mark_non_differentiable(means, variances, rstds)
    ctx.count = len(ys)
    ctx.beta_dtypes = [beta.dtype for beta in betas]
    ctx.needs_dy = [y.requires_grad for y in ys]
    ctx.save_for_backward(*ys, means, rstds, *gammas)


def _autograd(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    ys, (means, rstds), gammas = saved[: ctx.count], saved[ctx.count : ctx.count + 2], saved[ctx.count + 2 :]
    dys, dgammas, dbeta = bn_sum_backward(like(grad, ys[0]), ys, means, rstds, gammas, ctx.needs_dy)
    return (
        by_map(dys, ctx.needs_dy),
        [d.to(gamma.dtype) for gamma, d in zip(gammas, dgammas, strict=False)],
        [dbeta.to(dtype) for dtype in ctx.beta_dtypes],
        None,
        None,
    )


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "bn_sum_backward has no derivative of its own; for second derivatives use acblock(), whose backward is "
        "differentiable, or torch.nn.functional.batch_norm"
    )


torch.library.register_autograd("acnet_kernels::bn_sum_forward", _autograd, setup_context=_setup_context)
torch.library.register_autograd("acnet_kernels::bn_sum_backward", _refuse)
check.refuse_leaves(_LIBRARY, bn_sum_backward_)
