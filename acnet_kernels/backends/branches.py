"""Every branch's convolution, with all batch norms and additions done by two operators (ops/bn_sum.py).

Forward: y_b = W_b * x, then out = Σ_b BN_b(y_b) in two passes over the maps. Backward: two passes write every dy_b,
over y_b's memory where nothing else can hold it, then come the library's convolution gradients, dx summed within
them where the library can (steps/maps.py), in place otherwise. The identity's map is x, and its dy the
first summand of dx. Saved: x as it came, the convolutions' y_b, and two numbers a channel and branch. Where the
convolutions of a half-precision step are computed in float32, the y_b are rounded to be kept and widened again for
backward: as exact as eager, which has the rounded ones throughout.

On CUDA each phase (forward, dgrad, wgrad) is the library's convolutions or one of Triton's kernels for all branches
at once, as backends/phases.py chooses, and the batch-norm passes over channels_last maps are Triton's. Under
torch.compile Triton's kernels run where they are chosen for all three phases, the library's convolutions otherwise.

A convolution's bias cancels against the batch mean: it moves the running mean alone, and its gradient is zero
(eager's is rounding noise around zero). The step is differentiable twice: a backward with create_graph=True
recomputes it by eager formulas, as does one for a batch of gradients at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_compat import below_autograd, keeps_graph, top_saved_tensors_hooks
from ..geometry import Geometry
from ..ops import _extension, bn_sum
from ..ops.epilogue import ACTIVATIONS, is_clamp
from ..ops.running import Running
from ..spec import NOTHING, Epilogue, Norm, Problem, Step, autocast_dtype, prefers_channels_last
from ..steps import direct
from ..steps.assignment import ALL_LIBRARY, ALL_TRITON, Phases
from ..steps.batchnorm import Tracked, Update, update_running
from ..steps.convolution import computed_directly, convolution_dtype, direct_bytes, gradient_bytes
from ..steps.epilogue import finish
from ..steps.maps import Finished, StepConfig, config_of, convolution_gradients
from ..steps.open_sum import open_sum
from ..steps.packed import Branches
from . import mixed, node, nodes
from .phases import assignments, label, phases_of

NAME = "branches"

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def declines(problem: Problem) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    if not all(problem.batch_stats):
        return "a batch norm normalises by running statistics"
    if problem.shape[0] == 0:
        return "the batch is empty"
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} has no batch-norm sum"
    if problem.device not in ("cpu", "cuda", "meta"):
        return f"device type {problem.device} has no batch-norm sum"
    return mixed.declines(problem)


def unfused(problem: Problem) -> str | None:
    """Why its batch-norm sums are plain PyTorch's here, and slow, or None."""
    if problem.device != "cuda":
        return _extension.WHY_MISSING or None
    if not _extension.TRITON:
        return "Triton, whose passes add batch norms up, is not installed"
    if not problem.channels_last or problem.dtype == torch.float64:
        return "Triton's passes take channels_last maps, and none of float64"
    return None


def saved_bytes(problem: Problem) -> int:
    """Bytes of maps kept for backward: x as it came, and every y_b but one that is cheaply computed again."""
    if not problem.grad:
        return 0
    nested, problem = mixed.saved_bytes(problem), mixed.inner(problem)
    inputs = problem.input_bytes // problem.dtype.itemsize * problem.input_dtype.itemsize
    return nested + inputs + (problem.normalised_maps - maps_again(problem)) * problem.output_bytes


def maps_again(problem: Problem) -> int:
    """How many of the y_b are not kept, but computed again for backward: that of the fewest taps, by the node."""
    return int(computed_directly(problem) and sum(problem.convolved) > 1)


def transient_bytes(problem: Problem) -> int:
    """Bytes of maps that a step holds at most besides what it keeps, its output and its gradients among them."""
    nested, problem = mixed.transient_bytes(problem), mixed.inner(problem)
    if computed_directly(problem):
        forward, backward = direct_bytes(problem)
        backward += maps_again(problem) * problem.output_bytes
        return nested + max(forward + problem.output_bytes, backward if problem.grad else 0)
    dtype = convolution_dtype(problem.dtype, problem.device)
    forward = problem.output_bytes
    if len(problem.branches) > len(problem.batch_stats):  # a branch's map on its way into their sum
        forward += problem.map_bytes(dtype)[1]
    backward = gradient_bytes(problem, dtype) if problem.grad else 0
    if problem.grad and dtype != problem.dtype:  # the y_b, widened; else they become their own gradients
        backward += problem.normalised_maps * problem.map_bytes(dtype)[1]
    return nested + max(forward, backward) + (problem.map_bytes(dtype)[0] if problem.input_dtype != dtype else 0)


def _composed(config: StepConfig, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, means, variances) from operators that torch.compile can trace and differentiate."""
    if config.phases != ALL_TRITON:  # the gradient of its operator is by Triton too
        config = config._replace(phases=ALL_LIBRARY)
    # AOTInductor of torch 2.10 and 2.11 hands an operator another dtype than it is given: it is given none.
    given = config._replace(dtype=config.conv_dtype) if torch.compiler.is_exporting() else config
    with nodes.without_autocast(x.device.type):
        if config.phases == ALL_LIBRARY and not torch.compiler.is_exporting():
            weights, gammas, betas = config.split(tensors)
            return open_sum(_maps(config, x, weights), gammas, betas, config.eps, config.dtype)
        out, _, means, variances, _ = given.forward(x, *config.split(tensors))
    return out.to(config.dtype), means, variances


def _maps(config: StepConfig, x: Tensor, weights: tuple[Tensor, ...]) -> list[Tensor]:
    # What the node would have, for a compiler.
    is_ours = x.device.type == "cpu" and _extension.LOADED and not config.is_summed()
    if is_ours and node.computes_directly(x, weights[0], config):
        return direct.maps(config, x, weights, prefers_channels_last(x, weights[0]))
    return config.maps(x, weights)


@functools.cache
def keep_freed_memory() -> None:
    """Has glibc keep freed maps for the next step, up to 64 MiB, where it would hand them back to the system.

    Its thresholds follow the largest block ever freed: one of just under 32 MiB, never touched, raises them to
    their maximum for good, as freeing a map of that size would. Otherwise a step of a few 8 MB maps faults in
    thousands of fresh pages, which costs as much as its arithmetic.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


class MapsStep(torch.autograd.Function):
    """The same in one node, which knows that nobody else needs the y_b."""

    @staticmethod
    def forward(
        ctx: Any,
        config: StepConfig,
        update: Update | Tracked,
        epilogue: Epilogue,
        residual: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, gammas, betas = config.split(tensors)
        # Nothing here is differentiated: calls need not pass the dispatcher's autograd layer.
        with nodes.without_autocast(x.device.type), below_autograd():
            out, ys, means, variances, rstds = config.step(x, weights, gammas, betas, update, epilogue)
        ctx.config, ctx.activation = config, epilogue.activation
        # A hook on saved tensors may keep what it was given.
        ctx.owns_maps = top_saved_tensors_hooks(True) is None
        kept = (
            ys
            if config.is_summed()
            else [y for y, (_, convolved) in zip(ys, config.branches, strict=True) if convolved]
        )
        # What comes after the sum needs: the activation's output, or what it is computed from again.
        after = [*betas, out if is_clamp(epilogue.activation) else residual] if epilogue.activation else []
        ctx.after = len(after)
        ctx.save_for_backward(x, *weights, *gammas, means, rstds, *after, *(y.to(config.dtype) for y in kept))
        ctx.mark_non_differentiable(means, variances)
        ctx.set_materialize_grads(False)
        return out, means, variances

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        config: StepConfig = ctx.config
        x, *saved = ctx.saved_tensors
        weights, gammas, (means, rstds, *rest) = config.split(tuple(saved))
        after, kept = rest[: ctx.after], rest[ctx.after :]
        needs_residual, needs_x, needs_w = needs[3], needs[4], config.split(needs[5:])[0]
        # Autograd casts what is returned to the inputs' dtypes.
        with nodes.without_autocast(x.device.type):
            if nodes.wants_definition(grad):
                inputs = (x, *weights, *gammas)
                definition = functools.partial(config.definition, *inputs)
                found = nodes.finished_gradients(
                    definition, inputs, (*needs[4:], needs_residual), grad, ctx.activation, after
                )
                return None, None, None, found[-1], *found[:-1]
            needs_dy = config.needs_dy(needs_x, needs_w)
            owns = (ctx.owns_maps and not keeps_graph()) or config.conv_dtype != config.dtype
            kept = [y.to(config.conv_dtype) for y in kept]
            dr = grad if needs_residual else None
            grad = bn_sum.like(grad, kept[0])
            of_norms = (means, rstds, gammas)
            with below_autograd():
                if ctx.activation:
                    dr = torch.empty_like(grad) if needs_residual else None
                    finished = Finished(ctx.activation, after[:-1], after[-1], dr)
                    dys, dgammas, dbeta = config.finished_gradients(
                        grad, x, kept, *of_norms, needs_dy, owns, finished
                    )
                else:
                    dys, dgammas, dbeta = config.map_gradients(grad, x, kept, *of_norms, needs_dy, owns)
            dx, dws = convolution_gradients(config, dys, x, weights, needs_x, needs_w)
        of_gammas = dgammas.unbind() if config.affine else ()
        of_betas = [dbeta] * (len(needs) - 5 - len(weights) - config.affine)
        return None, None, None, dr, dx, *dws, *of_gammas, *of_betas


class Inputs(NamedTuple):
    """A step's tensors: weights one a convolution, biases and the rest one a batch norm, the branches' first.

    There may be no γ or no β at all.
    """

    branches: Branches
    normed: tuple[bool, ...]  # which have a batch norm of their own; of a single branch, the only one is its own
    weights: list[Tensor]
    biases: list[Tensor | None]
    norms: list[Norm]
    gammas: list[Tensor]
    betas: list[Tensor]
    eps: list[float]
    dtype: torch.dtype  # of the output

    def config(self, geometry: Geometry, device: str, phases: Phases = ALL_LIBRARY) -> StepConfig:
        """All but the tensors."""
        return config_of(
            geometry, self.branches, self.eps, self.normed, len(self.gammas), self.dtype, device, phases
        )


def inputs_of(x: Tensor, step: Step) -> Inputs:
    """The step's tensors."""
    norms = step.norms
    weights = [branch.weight for branch in step.branches if branch.weight is not None]
    gammas = _all_or_none([norm.gamma for norm in norms], 1.0)
    betas = _all_or_none([norm.beta for norm in norms], 0.0)
    normed = tuple([branch.norm is not None for branch in step.branches])
    biases = [branch.bias for branch in step.branches if branch.norm is not None]
    if step.norm is not None:
        given = [branch.bias for branch in step.branches if branch.norm is None and branch.bias is not None]
        biases.append(functools.reduce(torch.add, given) if given else None)
        normed = (True,) if len(normed) == 1 and len(norms) == 1 else normed
    if any(bias is not None and bias.requires_grad for bias in biases):
        # The bias shifts a mean that is subtracted again: its gradient is zero, but it has one.
        betas = betas or [torch.zeros_like(weights[0][:, 0, 0, 0]) for _ in norms]
        betas = [beta if bias is None else beta + 0 * bias for beta, bias in zip(betas, biases, strict=True)]
    return Inputs(
        branches_of(step),
        normed,
        weights,
        biases,
        norms,
        gammas,
        betas,
        [norm.eps for norm in norms],
        autocast_dtype(x.dtype, x.device.type),
    )


def branches_of(step: Step) -> Branches:
    """The step's branches as a config has them."""
    return tuple([(b.taps, b.weight is not None) for b in step.branches])  # type: ignore[misc]


def forward(x: Tensor, step: Step, epilogue: Epilogue = NOTHING) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros), and what follows it."""
    return mixed.forward(lambda x, step, epilogue: run(x, step, phases_of(step, x), epilogue), x, step, epilogue)


def run(x: Tensor, step: Step, phases: Phases, epilogue: Epilogue = NOTHING) -> Tensor:
    """forward() under this assignment of its phases."""
    geometry = step.geometry
    size = geometry.output_size(x.shape[2], x.shape[3])
    count = x.shape[0] * size[0] * size[1]
    inputs = inputs_of(x, step)
    config = inputs.config(geometry, x.device.type, phases)
    tensors = (x, *inputs.weights, *inputs.gammas, *inputs.betas)
    if not torch.compiler.is_compiling():
        if x.is_cpu:
            keep_freed_memory()
            number = node.number_of(config, x, inputs, True)
            if number is not None:
                return node.run(number, x, inputs, epilogue)
        return _apply(config, Update(inputs.norms, count, inputs.biases), epilogue, tensors)
    out, means, variances = _composed(config, *tensors)
    with torch.no_grad():  # not by Update: Dynamo of torch 2.10 calls no instance of a named tuple
        update_running(inputs.norms, means, variances, count, inputs.biases)
    return finish(out, epilogue)


def _apply(config: StepConfig, update: Update | Tracked, epilogue: Epilogue, tensors: Sequence[Tensor]) -> Tensor:
    """The step on x, the weights, the γs and the βs by a node of Python's."""
    within, after = (
        (epilogue, NOTHING) if config.finishes(epilogue, tensors[0].device.type) else (NOTHING, epilogue)
    )
    given = (config, update, within, within.residual, *tensors)
    if config.phases == ALL_TRITON:
        from .triton_node import TritonStep  # Triton is slow to import

        return finish(TritonStep.apply(*given), after)
    return finish(MapsStep.apply(*given)[0], after)


class Again(NamedTuple):
    """A training step on CUDA again, of the tensors that its block has now: what a lane calls (lanes.py)."""

    config: StepConfig
    momenta: tuple[float, ...]
    elements: int  # a channel, of the output

    def __call__(
        self,
        x: Tensor,
        weights: list[Tensor],
        gammas: list[Tensor],
        betas: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        counters: list[Tensor],
        activation: int,
        residual: Tensor | None,
    ) -> Tensor:
        tracked = Tracked(Running(means, variances, counters, (), self.momenta), self.elements)
        epilogue = Epilogue(ACTIVATIONS[activation], residual)
        return _apply(self.config, tracked, epilogue, (x, *weights, *gammas, *betas))


def again(x: Tensor, step: Step) -> Again | None:
    """The step, which has a batch norm a branch, to be taken again; None where some may be taken in another way."""
    inputs = inputs_of(x, step)
    momenta = tuple([norm.momentum for norm in inputs.norms if norm.momentum is not None])
    if len(momenta) < len(inputs.norms) or any(bias is not None for bias in inputs.biases):
        return None
    if any(norm.running_mean is None or norm.num_batches_tracked is None for norm in inputs.norms):
        return None
    rows, columns = step.geometry.output_size(x.shape[2], x.shape[3])
    config = inputs.config(step.geometry, x.device.type, phases_of(step, x))
    return Again(config, momenta, x.shape[0] * rows * columns)


class Variant(NamedTuple):
    """This backend under one assignment of its phases, as a timer times it."""

    NAME: str
    phases: Phases

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """One step."""
        return mixed.forward(lambda x, step, _: run(x, step, self.phases), x, step)


def variants(problem: Problem) -> list[Variant]:
    """This backend under every assignment of its phases; under its own name where there is but one."""
    found = assignments(problem)
    return [Variant(NAME if len(found) == 1 else label(phases), phases) for phases in found]


def _all_or_none(tensors: list[Tensor | None], missing: float) -> list[Tensor]:
    """The tensors with constants for the missing ones; [] where all are missing."""
    given = [t for t in tensors if t is not None]
    return [torch.full_like(given[0], missing) if t is None else t for t in tensors] if given else []
