"""Steps whose batch norms are nested or missing, by any backend that computes a sum of normalised branches.

The branches with a batch norm of their own are one such sum; the others' maps are added to it, and the batch norm
after the sum, where there is one, is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..spec import MIXED, NOTHING, Epilogue, Problem, Step
from ..steps.batchnorm import batch_norm
from ..steps.epilogue import finish
from .eager import branch_map


def declines(problem: Problem) -> str | None:
    """Why no part of the problem is a sum of normalised branches, or None."""
    parts = zip(problem.convolved, problem.normed, strict=True)
    if problem.norm == MIXED and not any(convolved and normed for convolved, normed in parts):
        return "no convolution has a batch norm of its own"
    return None


def inner(problem: Problem) -> Problem:
    """The part of the problem that is a sum of normalised branches: mostly all of it."""
    if problem.norm != MIXED:
        return problem
    kept = [i for i, normed in enumerate(problem.normed) if normed]
    return replace(
        problem,
        branches=tuple(problem.branches[i] for i in kept),
        convolved=tuple(problem.convolved[i] for i in kept),
        normed=(True,) * len(kept),
        total=False,
        batch_stats=problem.batch_stats[: len(kept)],
    )


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for backward besides what the inner sum keeps: what the batch norm after the sum normalises."""
    return problem.output_bytes if problem.norm == MIXED and problem.total and problem.grad else 0


def transient_bytes(problem: Problem) -> int:
    """Bytes that a step holds at most besides those of the inner sum: a map to be added, and the new sum."""
    return 2 * problem.output_bytes if problem.norm == MIXED else 0


def forward(
    sum_of_normalised: Callable[[Tensor, Step, Epilogue], Tensor],
    x: Tensor,
    step: Step,
    epilogue: Epilogue = NOTHING,
) -> Tensor:
    """One step on x and what follows it.

    The function computes the inner sum, and what follows where that sum is all of the step.
    """
    own = tuple([branch for branch in step.branches if branch.norm is not None])
    if not own or (step.norm is None and len(own) == len(step.branches)):
        return sum_of_normalised(x, step, epilogue)
    out = sum_of_normalised(x, replace(step, branches=own, norm=None), NOTHING)
    for branch in step.branches:
        if branch.norm is None:
            out = out + branch_map(x, branch, step.geometry)
    return finish(out if step.norm is None else batch_norm(out, step.norm), epilogue)
