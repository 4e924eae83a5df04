"""Folding blocks, all in one operator call: W = Σ_b s_b·embed(W_b) and its bias (arXiv 1908.03930 §3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Norm, Step
from .fuse_blocks import ERROR, Arguments

_ABSENT = Norm(None, None, None, None, None, 0.0, None, False)
_fuse_blocks = torch.ops.acnet_kernels.fuse_blocks.default
_fuse_blocks_out = torch.ops.acnet_kernels.fuse_blocks_out.default


def fold(step: Step) -> tuple[Tensor, Tensor]:
    """(weight K×C/groups×k×k, bias K) of the one convolution that equals the block in eval; as `fold_steps`."""
    return fold_steps([step])[0]


def fold_steps(
    steps: Sequence[Step], out: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """One (weight K×C/groups×k×k, bias K) a step: the one convolution that equals the block in eval.

    Computed in float32 (float64 for float64 weights), in the square weight's dtype and memory format, for all
    steps in one call. Blocks may differ in everything but their device. Differentiable in every weight,
    convolution bias, γ and β unless `out` is given.

    Args:
        steps: what `ACBlock.step()` returns. Every batch norm must have running statistics.
        out: (weight, bias) pairs to write into, contiguous or channels_last, sharing no memory with the inputs;
            no gradient is recorded then. Saves the page faults of fresh memory.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a missing running variance, or on the CPU a
            negative or non-finite one; names block and argument. Nothing has been written then.
    """
    arguments = _arguments(steps)
    try:
        if out is None:
            weights, biases = _call(_fuse_blocks, arguments, torch.is_grad_enabled())
            return list(zip(weights, biases, strict=True))
        targets = [weight for weight, _ in out], [bias for _, bias in out]
        _call(_fuse_blocks_out, (*arguments, *targets), False)
    except RuntimeError as error:  # all that the stable ABI lets a C++ operator raise
        message = str(error)
        if not message.startswith(ERROR):
            raise
        raise ValueError(message.removeprefix(ERROR).split("\n")[0]) from None
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*targets[0], *targets[1]])
    return list(out)


def _call(operator, arguments, differentiable: bool):  # type: ignore[no-untyped-def]
    if differentiable or torch.compiler.is_compiling():
        return operator(*arguments)
    # Straight to the kernel: for a whole network's tensors, finding out that none needs a gradient takes as long
    # as the call itself.
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _arguments(steps: Sequence[Step]) -> Arguments:
    square, hor, ver, norms, conv_bias, place = [], [], [], [], [], []
    for step in steps:
        geometry, branches, total = step.geometry, step.branches, step.norm
        for name, kernels in (("square", square), ("hor", hor), ("ver", ver)):
            branch = branches.get(name)
            if branch is None:
                kernels.append(None)
                norms.append(_ABSENT)
                conv_bias.append(None)
                continue
            weight, bias, norm = branch
            kernels.append(weight)
            conv_bias.append(bias)
            if total is None:
                assert norm is not None
                norms.append(norm)
            else:  # the norm of the sum: its μ and β once, its scale for every branch
                norms.append(total if name == "square" else total._replace(beta=None, running_mean=None))
        place += (geometry.hor_row, geometry.ver_column)
    gamma, beta, mean, var, _, eps, _, _ = zip(*norms, strict=True) if norms else ((),) * 8
    return Arguments(square, hor, ver, gamma, beta, mean, var, conv_bias, eps, place)
