"""Folding blocks, all in one operator call: W = Σ_b s_b·embed(W_b) and its bias (arXiv 1908.03930 §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import Step
from .fuse_blocks import BETA, BRANCH, CONV_BIAS, ERROR, GAMMA, MEAN, Arguments, decomposed

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
    arguments = Arguments.empty()
    for step in steps:
        append_step(arguments, step)
    return fold_arguments(arguments, out)


def fold_arguments(
    arguments: Arguments, out: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """`fold_steps` of blocks whose tensors are already in the operator's lists."""
    try:
        if out is None:
            if torch.compiler.is_exporting():
                return list(zip(*decomposed(arguments), strict=True))
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


def _call(operator: Any, arguments: tuple[Any, ...], differentiable: bool) -> Any:
    if differentiable or torch.compiler.is_compiling():
        return operator(*arguments)
    # Straight to the kernel: for a whole network's tensors, finding out that none needs a gradient takes as long
    # as the call itself.
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def append_step(a: Arguments, step: Step) -> None:
    """Appends one block to the operator's lists.

    Raises:
        ValueError: a batch norm has no running variance; a is then of no more use.
    """
    branches, total = step.branches, step.norm
    for name, kernels in (("square", a.square), ("hor", a.hor), ("ver", a.ver)):
        branch = branches.get(name)
        if branch is None:
            append_absent(a)
            continue
        norm = branch.norm if total is None else total
        assert norm is not None
        if norm.running_var is None:
            raise ValueError(
                f"block {len(a.place) // 2}: var of {name} is missing: a batch norm without running statistics "
                "normalises by the batch, and no fixed convolution equals it"
            )
        # The norm of the sum: its μ and β count once, its scale for every branch.
        once = total is None or name == "square"
        beta, mean = (norm.beta, norm.running_mean) if once else (None, None)
        append_branch(a, kernels, branch.weight, branch.bias, norm.gamma, beta, mean, norm.running_var, norm.eps)
    a.place.extend((step.geometry.hor_row, step.geometry.ver_column))


def append_branch(
    a: Arguments,
    kernels: list[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor,
    eps: float,
) -> None:
    """Appends one branch to the operator's lists; kernels is a's list for its weight."""
    present = BRANCH
    kernels.append(weight)
    a.var.append(var)
    a.eps.append(eps)
    if gamma is not None:
        present |= GAMMA
        a.gamma.append(gamma)
    if beta is not None:
        present |= BETA
        a.beta.append(beta)
    if mean is not None:
        present |= MEAN
        a.mean.append(mean)
    if conv_bias is not None:
        present |= CONV_BIAS
        a.conv_bias.append(conv_bias)
    a.present.append(present)


def append_absent(a: Arguments) -> None:
    """Appends a branch that the block does not have."""
    a.present.append(0)
    a.eps.append(0.0)
