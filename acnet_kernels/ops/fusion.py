"""Folding blocks, all in one operator call: W = Σ_b s_b·embed(W_b) and its bias (arXiv 1908.03930 §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import Step
from .fuse_blocks import ANY_VARIANCE, BETA, BRANCH, CONV_BIAS, ERROR, GAMMA, MEAN, Arguments, decomposed

_fuse_blocks = torch.ops.acnet_kernels.fuse_blocks.default
_fuse_blocks_out = torch.ops.acnet_kernels.fuse_blocks_out.default


def fold(step: Step) -> tuple[Tensor, Tensor]:
    """(weight K×C/groups×k×k, bias K) of the one convolution that equals the block in eval; as `fold_steps`."""
    return fold_steps([step])[0]


def fold_as_it_is(step: Step) -> tuple[Tensor, Tensor]:
    """`fold` whatever the running variances are: a negative or non-finite one makes of its channel what it makes of
    nn.BatchNorm2d's."""
    arguments = Arguments.empty()
    append_step(arguments, step)
    return fold_arguments(arguments._replace(present=[p and p | ANY_VARIANCE for p in arguments.present]))[0]


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


# weight, conv_bias, gamma, beta, mean, var, eps: what the operator's lists hold of one branch.
FoldBranch = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor, float]
_COMPLETE = (BRANCH | GAMMA | BETA | MEAN,) * 3


def append_step(a: Arguments, step: Step) -> None:
    """Appends one block to the operator's lists.

    Raises:
        ValueError: a batch norm has no running variance; a is then of no more use.
    """
    total = step.norm
    found: list[FoldBranch | None] = []
    k = step.geometry.kernel[0]
    by = {(b.taps.rows > 1, b.taps.columns > 1) if k > 1 else i: b for i, b in enumerate(step.branches)}
    place = [k // 2, k // 2]
    for i, name in enumerate(((True, True), (False, True), (True, False))):
        branch = by.get(name if k > 1 else i)
        if branch is not None and i:
            place[i - 1] = branch.taps[i - 1]
        if branch is None:
            found.append(None)
            continue
        norm = branch.norm if total is None else total
        assert norm is not None
        if norm.running_var is None:
            raise ValueError(
                f"block {len(a.place) // 2}: var of {name} is missing: a batch norm without running statistics "
                "normalises by the batch, and no fixed convolution equals it"
            )
        # The norm of the sum: its μ and β count once, its scale for every branch.
        once = total is None or i == 0
        beta, mean = (norm.beta, norm.running_mean) if once else (None, None)
        found.append((branch.weight, branch.bias, norm.gamma, beta, mean, norm.running_var, norm.eps))
    append_branches(a, found, tuple(place))


def append_branches(a: Arguments, found: list[FoldBranch | None], place: tuple[int, int]) -> None:
    """Appends one block, its square, hor and ver, to the operator's lists; place is hor's row and ver's column."""
    a.place.extend(place)
    square, hor, ver = found
    if square is not None and hor is not None and ver is not None:
        # Nearly always everything but a convolution bias is there, so all at once: this runs for every block.
        (w0, c0, g0, b0, m0, v0, e0), (w1, c1, g1, b1, m1, v1, e1), (w2, c2, g2, b2, m2, v2, e2) = square, hor, ver
        if (
            c0 is c1 is c2 is None
            and (g0 is not None and g1 is not None and g2 is not None)
            and (b0 is not None and b1 is not None and b2 is not None)
            and (m0 is not None and m1 is not None and m2 is not None)
        ):
            a.square.append(w0)
            a.hor.append(w1)
            a.ver.append(w2)
            a.gamma.extend((g0, g1, g2))
            a.beta.extend((b0, b1, b2))
            a.mean.extend((m0, m1, m2))
            a.var.extend((v0, v1, v2))
            a.eps.extend((e0, e1, e2))
            a.present.extend(_COMPLETE)
            return
    for branch, kernels in zip(found, (a.square, a.hor, a.ver), strict=True):
        if branch is None:
            a.present.append(0)
            a.eps.append(0.0)
            continue
        weight, conv_bias, gamma, beta, mean, var, eps = branch
        kernels.append(weight)
        a.var.append(var)
        a.eps.append(eps)
        present = BRANCH
        for bit, tensor, tensors in (
            (GAMMA, gamma, a.gamma),
            (BETA, beta, a.beta),
            (MEAN, mean, a.mean),
            (CONV_BIAS, conv_bias, a.conv_bias),
        ):
            if tensor is not None:
                present |= bit
                tensors.append(tensor)
        a.present.append(present)
