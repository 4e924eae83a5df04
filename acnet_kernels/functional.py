"""acblock(): one call, one step of a block, whatever computes it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ._torch_compat import is_batched, is_wrapped_by_transform
from .backends import planner
from .geometry import MOST_BRANCHES, Geometry
from .spec import (
    NOTHING,
    TENSORS,
    TORCH_FUNC,
    Branch,
    Epilogue,
    Norm,
    Problem,
    Step,
    autocast_dtype,
    problem_of,
)
from .steps.epilogue import check_activation, check_residual, finish


def acblock(
    x: Tensor,
    branches: Iterable[Branch],
    geometry: Geometry,
    *,
    norm: Norm | None = None,
    backend: str = "auto",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Σ_b BN_b(W_b * x), and of that sum the batch norm where norm is given (arXiv 1908.03930 §3.2).

    A branch without a batch norm adds W_b * x itself, one without a weight x. The residual is added to the result,
    and of that the activation is taken.

    Running statistics and batch counters of the norms that normalise by the batch are updated in place.

    Args:
        x: input, N×C×H×W, any memory layout; the result has the layout nn.Conv2d would give.
        branches: 1 to 8, one of them with a weight at least.
        geometry: of the kernel whose taps the branches are.
        norm: the batch norm after the sum.
        backend: 'auto' or a backend's name; one that cannot compute the step gives way, and the plan says so.
        activation: 'relu', 'relu6', 'hardswish', 'silu', or None.
        residual: a map of the output's shape, dtype and device.

    Raises:
        TypeError: x has another dtype than a weight, and autocast does not cast both; activation is no str, or
            residual no tensor.
        ValueError: x is not 4-D, has other channels than the weights, or gives an empty output, or one value a
            channel to normalise by; a tensor is on another device than x; a branch lies outside the kernel, does
            not fit the others, or is an identity where maps change their size; backend or activation is unknown;
            the residual is not like the output; running statistics would have to change inside a torch.func
            transform that cannot change them.
    """
    epilogue = Epilogue(check_activation(activation), residual)
    return run(x, step_of(branches, geometry, norm), backend, epilogue)


def run(x: Tensor, step: Step, backend: str, epilogue: Epilogue = NOTHING) -> Tensor:
    """acblock() on a step put together already."""
    problem = describe(x, step)
    plan = planner.choose(problem, planner.check_choice(backend))
    _check_devices(x, step)
    if epilogue.is_nothing():
        return plan.backend.forward(*step.padded(x))
    if epilogue.residual is not None:
        shape = (problem.shape[0], problem.out_channels, *problem.output_size)
        check_residual(epilogue.residual, shape, problem.dtype, x.device)
    if plan.backend in planner.FINISHING:
        return plan.backend.forward(*step.padded(x), epilogue)
    return finish(plan.backend.forward(*step.padded(x)), epilogue)


def plan(x: Tensor, step: Step, backend: str) -> tuple[Problem, planner.Choice]:
    """What run() would do with the same arguments, and why; x may be a meta tensor. Computes nothing."""
    problem = describe(x, step)
    return problem, planner.choose(problem, planner.check_choice(backend))


def step_of(branches: Iterable[Branch], geometry: Geometry, norm: Norm | None) -> Step:
    """A step of these; ValueError where they are none."""
    found = tuple(branches)
    weights = [branch.weight for branch in found if branch.weight is not None]
    if not weights or len(found) > MOST_BRANCHES:
        raise ValueError(
            f"branches must be 1 to {MOST_BRANCHES} with one weight at least, got {len(found)} with {len(weights)}"
        )
    K, C = weights[0].shape[:2]
    placed = []
    for i, branch in enumerate(found):
        taps = branch.taps
        if branch.weight is None:
            centre = geometry.centre
            if centre is None or taps not in (None, centre) or C * geometry.groups != K:
                raise ValueError(
                    f"branches[{i}], the identity, needs as many channels out as in, stride 1 and an odd kernel "
                    f"padded to keep a map's size, got {C * geometry.groups} in, {K} out and {geometry}"
                )
            taps = centre
        elif taps is None:
            raise ValueError(f"branches[{i}].taps must say which taps its weight is of, got None")
        else:
            geometry.check_taps(taps, f"branches[{i}].taps")
            wanted = (K, C, taps.rows, taps.columns)
            if branch.weight.shape != wanted:
                raise ValueError(f"branches[{i}].weight must be {wanted}, got {tuple(branch.weight.shape)}")
        placed.append(branch._replace(taps=taps))
    return Step(geometry, tuple(placed), norm)


def describe(x: Tensor, step: Step) -> Problem:
    """Checks that step can be taken on x, and says what the choice of a backend depends on."""
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"input must be 4-D (N×C×H×W), got {len(shape)}-D of shape {tuple(shape)}")
    kernel = step.kernel
    channels = kernel.shape[1] * step.geometry.groups
    if shape[1] != channels:
        raise ValueError(f"input must have {channels} channels, got {shape[1]} (shape {tuple(shape)})")
    rows, columns = step.geometry.output_size(shape[2], shape[3])
    # nn.BatchNorm2d's own check, made before any branch has moved its counter and statistics.
    if shape[0] * rows * columns == 1 and any(n.batch_stats and n.group is None for n in step.norms):
        maps = (1, kernel.shape[0], 1, 1)
        raise ValueError(f"expected more than 1 value per channel when training, got maps of shape {maps}")
    problem = problem_of(step, x)
    for branch in step.branches:
        dtype = x.dtype if branch.weight is None else branch.weight.dtype
        if dtype != x.dtype and autocast_dtype(dtype, problem.device) != problem.dtype:
            raise TypeError(f"input must have the weights' dtype {dtype}, got {x.dtype}")
    if problem.transform:
        _check_transform(step, x, problem.transform)
    return problem


def _check_devices(x: Tensor, step: Step) -> None:
    """Refuses tensors of several devices: a kernel would read memory that is not there."""
    device = x.device
    for owner, tensors in step.tensors():
        for tensor in tensors:
            if tensor is not None and tensor.device != device:
                name = next(name for name, t in zip(TENSORS, tensors, strict=False) if t is tensor)
                raise ValueError(
                    f"every tensor must be on one device: the input is on {device}, "
                    f"{name} of {owner} on {tensor.device}"
                )


def _check_transform(step: Step, x: Tensor, transform: str) -> None:
    """Refuses what a transform cannot do, before a counter or a statistic has changed."""
    for norm in step.norms:
        if norm.group is not None:
            raise ValueError(f"SyncBatchNorm has no rule for {transform}: call eval() on it first")
        if transform != TORCH_FUNC or not norm.batch_stats or norm.running_mean is None:
            continue
        if is_batched(x) and not is_batched(norm.running_mean):
            raise ValueError(
                "running statistics cannot be updated in place under torch.func.vmap: call eval(), use batch norms "
                "with track_running_stats=False, or batch the buffers too (torch.func.stack_module_state)"
            )
        if not is_wrapped_by_transform(norm.running_mean):
            raise ValueError(
                "running statistics cannot be updated in place inside a torch.func transform that captures them: "
                "pass the buffers as arguments through torch.func.functional_call, or call eval()"
            )
