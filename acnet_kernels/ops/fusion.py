"""Folding blocks, all in one operator call: W = Σ_b s_b·embed(W_b) and a bias (arXiv 1908.03930 §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import below_autograd
from ..spec import Norm, Step
from .fuse_blocks import ANY_VARIANCE, BETA, CONV_BIAS, ERROR, GAMMA, MEAN, SUM, VAR, WEIGHT, Arguments, decomposed

_fuse_blocks = torch.ops.acnet_kernels.fuse_blocks.default
_fuse_blocks_out = torch.ops.acnet_kernels.fuse_blocks_out.default


def fold(step: Step) -> tuple[Tensor, Tensor]:
    """(weight K×C/groups×k_h×k_w, bias K) of the one convolution that equals the block in eval; as `fold_steps`."""
    return fold_steps([step])[0]


def fold_as_it_is(step: Step) -> tuple[Tensor, Tensor]:
    """`fold` whatever the running variances are: a negative or non-finite one makes of its channel what it makes of
    nn.BatchNorm2d's."""
    return fold_arguments(fold_arguments_as_it_is(step))[0]


def fold_arguments_as_it_is(step: Step) -> Arguments:
    """The operator's arguments for `fold_as_it_is`."""
    arguments = Arguments.empty()
    append_step(arguments, step)
    arguments.branches[::6] = [present | ANY_VARIANCE for present in arguments.branches[::6]]
    return arguments


def fold_steps(
    steps: Sequence[Step], out: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """One (weight K×C/groups×k_h×k_w, bias K) a step: the one convolution that equals the block in eval.

    Computed in float32 (float64 for float64 weights), for all steps in one call. In the dtype of a step's weights,
    and channels_last where one of them is that and not contiguous. Blocks may differ in everything but their
    device. Differentiable in every weight, convolution bias, γ and β unless `out` is given.

    Args:
        steps: what a block's `step()` returns. Every batch norm must have running statistics.
        out: (weight, bias) pairs to write into, contiguous or channels_last, sharing no memory with the inputs;
            no gradient is recorded then. Saves the page faults of fresh memory.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a missing running variance, or on the CPU a
            negative or non-finite one; names block, branch and argument. Nothing has been written then.
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
    with below_autograd():
        return operator(*arguments)


# taps, weight, conv_bias, gamma, beta, mean, var, eps: what the operator's lists hold of one entry. The identity
# has no weight; a batch norm after the sum is the last entry, without taps.
FoldEntry = tuple[
    tuple[int, int, int, int, int] | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    float,
]
_USUAL = WEIGHT | GAMMA | BETA | MEAN | VAR


def append_step(a: Arguments, step: Step) -> None:
    """Appends one block to the operator's lists.

    Raises:
        ValueError: a batch norm has no running variance; a is then as it was.
    """
    rows, columns = step.geometry.kernel
    centre = (rows // 2, columns // 2, 1, 1, 1)  # where the identity sits, whose map is as large as x
    found: list[FoldEntry] = [
        (
            branch.taps or centre,
            branch.weight,
            branch.bias,
            *_tensors_of(branch.norm, a, branch.name or f"branch {i}"),
        )
        for i, branch in enumerate(step.branches)
    ]
    if step.norm is not None:
        found.append((None, None, None, *_tensors_of(step.norm, a, "the sum")))
    append_branches(a, step.geometry.kernel, step.geometry.groups, found)


def _tensors_of(
    norm: Norm | None, a: Arguments, name: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
    if norm is None:
        return None, None, None, None, 0.0
    if norm.running_var is None:
        raise ValueError(
            f"block {len(a.blocks) // 4}: var of {name} is missing: a batch norm without running statistics "
            "normalises by the batch, and no fixed convolution equals it"
        )
    return norm.gamma, norm.beta, norm.running_mean, norm.running_var, norm.eps


def append_branches(a: Arguments, kernel: tuple[int, int], groups: int, found: Sequence[FoldEntry]) -> None:
    """Appends one block of these entries to the operator's lists."""
    weights, gammas, betas, means, variances, biases, blocks, branches, epsilons = a
    blocks.extend((len(found), *kernel, groups))
    for taps, weight, conv_bias, gamma, beta, mean, var, eps in found:
        epsilons.append(eps)
        if (
            conv_bias is None
            and weight is not None
            and taps is not None
            and gamma is not None
            and beta is not None
            and mean is not None
            and var is not None
        ):  # nearly always, so all at once: this runs for every branch of a network
            weights.append(weight)
            gammas.append(gamma)
            betas.append(beta)
            means.append(mean)
            variances.append(var)
            branches.extend((_USUAL, *taps))
            continue
        present = SUM if taps is None else 0
        for bit, tensor, tensors in (
            (WEIGHT, weight, weights),
            (GAMMA, gamma, gammas),
            (BETA, beta, betas),
            (MEAN, mean, means),
            (VAR, var, variances),
            (CONV_BIAS, conv_bias, biases),
        ):
            if tensor is not None:
                present |= bit
                tensors.append(tensor)
        branches.extend((present, *(taps or (0, 0, 0, 0, 0))))
