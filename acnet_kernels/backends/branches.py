"""Every branch's convolution, with all batch norms and additions done by two operators (ops/bn_sum.py).

Forward: y_b = W_b * x, then out = Σ_b BN_b(y_b) in two passes over the maps. Backward: two passes write every dy_b,
over y_b's memory where nothing else can hold it, then come the library's convolution gradients, dx summed within
them where the library can (backends/convolution.py), in place otherwise. The identity's map is x, and its dy the
first summand of dx. Saved: x as it came, the convolutions' y_b, and two numbers a channel and branch.

On CUDA each phase (forward, dgrad, wgrad) is the library's convolutions or one of Triton's kernels for all branches
at once, as backends/phases.py chooses, and the batch-norm passes over channels_last maps are Triton's. Under
torch.compile Triton's kernels run where they are chosen for all three phases, the library's convolutions otherwise.

A batch norm after the sum of the branches needs that sum alone: it is added up from the branches' own convolutions,
as in eager (one convolution by the summed kernel would round larger terms), and differentiated as one convolution.

A convolution's bias cancels against the batch mean: it moves the running mean alone, and its gradient is zero
(eager's is rounding noise around zero). The step is differentiable twice: a backward with create_graph=True
recomputes it by eager formulas, as does one for a batch of gradients at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_compat import below_autograd, keeps_graph, top_saved_tensors_hooks
from ..geometry import Geometry, Placement
from ..kernels.window import MOST_BRANCHES, Window
from ..ops import _extension, bn_sum
from ..ops.recompute import Branches
from ..ops.running import NONE
from ..spec import Norm, Problem, Step, autocast_dtype
from . import mixed, node, nodes
from .batchnorm import Update, batch_norm
from .convolution import (
    add_input_gradient,
    column_weight_gradient,
    convolution_dtype,
    gradient_bytes,
    identity_kernel,
    merge_kernels,
    tap_view,
)
from .phases import ALL_LIBRARY, ALL_TRITON, TRITON, Phases, assignments, label, on_device, phases_of

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
    """Bytes of maps kept for backward: x as it came, and every y_b."""
    if not problem.grad:
        return 0
    nested, problem = mixed.saved_bytes(problem), mixed.inner(problem)
    widened = convolution_dtype(problem.dtype, problem.device).itemsize / problem.dtype.itemsize
    inputs = problem.input_bytes // problem.dtype.itemsize * problem.input_dtype.itemsize
    return nested + inputs + int(problem.normalised_maps * problem.output_bytes * widened)


def transient_bytes(problem: Problem) -> int:
    """Bytes of maps that a step holds at most besides what it keeps, its output and its gradients among them."""
    nested, problem = mixed.transient_bytes(problem), mixed.inner(problem)
    dtype = convolution_dtype(problem.dtype, problem.device)
    forward = problem.output_bytes
    if len(problem.branches) > len(problem.batch_stats):  # a branch's map on its way into their sum
        forward += problem.map_bytes(dtype)[1]
    # The y_b become their own gradients.
    backward = gradient_bytes(problem, dtype) if problem.grad else 0
    return nested + max(forward, backward) + (problem.map_bytes(dtype)[0] if problem.input_dtype != dtype else 0)


class StepConfig(NamedTuple):
    """Everything about a step but its tensors."""

    geometry: Geometry
    branches: Branches
    places: tuple[Placement, ...]
    eps: tuple[float, ...]  # of each batch norm: one a branch, or one after their sum
    affine: int  # how many γ there are: one a batch norm, or none
    dtype: torch.dtype  # of out
    conv_dtype: torch.dtype  # of the y_b
    phases: Phases
    window: tuple[int, ...]  # the geometry as Triton's operators take it

    def maps(self, x: Tensor, weights: tuple[Tensor, ...]) -> list[Tensor]:
        """What each batch norm normalises, y_b or their sum, in the layout of the first convolution's.

        The identity's is x itself, or a view of it. Differentiable.
        """
        x, given = x.to(self.conv_dtype), iter(weights)
        ys: list[Tensor | None] = []
        first: Tensor | None = None
        for place, (_, convolved) in zip(self.places, self.branches, strict=True):
            if not convolved:
                ys.append(None)
                continue
            args = (None, self.geometry.stride, place.padding, place.dilation, self.geometry.groups)
            y = F.conv2d(place.apply(x), next(given).to(self.conv_dtype), *args)
            if first is not None and self.is_summed:
                first += y
                continue
            first = y if first is None else first
            ys.append(bn_sum.like(y, first))
        assert first is not None
        for i, (place, (_, convolved)) in enumerate(zip(self.places, self.branches, strict=True)):
            if not convolved and self.is_summed:
                first += place.apply(x)
            elif not convolved:
                ys[i] = bn_sum.like(place.apply(x), first)
        return [first] if self.is_summed else [y for y in ys if y is not None]

    @property
    def is_triton(self) -> bool:
        """Whether Triton's kernels take these branches."""
        return all(convolved for _, convolved in self.branches) and (
            self.is_summed or len(self.branches) <= MOST_BRANCHES
        )

    @property
    def is_summed(self) -> bool:
        """Whether one batch norm follows the sum of several branches."""
        return len(self.eps) < len(self.branches)

    def forward(
        self, x: Tensor, weights: tuple[Tensor, ...], gammas: list[Tensor], betas: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
        """(out, ys, means, variances, rstds); ys are what maps() gives."""
        if self.phases.forward == TRITON:
            from . import triton_phases  # Triton is slow to import

            x, cast = x.to(self.conv_dtype), [weight.to(self.conv_dtype) for weight in weights]
            return triton_phases.forward(x, cast, gammas, betas, self.eps, self.window)
        ys = self.maps(x, weights)
        out, means, variances, rstds = bn_sum.bn_sum_forward(ys, gammas, betas, self.eps, self._out_dtype(ys))
        return out, ys, means, variances, rstds

    def step(
        self, x: Tensor, weights: tuple[Tensor, ...], gammas: list[Tensor], betas: list[Tensor], update: Update
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
        """forward(), not differentiable, and the update; Triton's passes move the running statistics themselves."""
        by_triton = self.phases.forward == TRITON
        ys = [] if by_triton else self.maps(x, weights)
        running = update.running() if by_triton or (on_device(x) and bn_sum.triton_takes(ys)) else None
        if by_triton:
            from . import triton_phases  # Triton is slow to import

            x, cast = x.to(self.conv_dtype), [weight.to(self.conv_dtype) for weight in weights]
            found = triton_phases.step(x, cast, gammas, betas, running or NONE, self.eps, self.window)
            out, ys, means, variances, rstds = found
        elif running is not None:
            from . import triton_phases

            dtype = self._out_dtype(ys)
            out, means, variances, rstds = triton_phases.bn_sum(ys, gammas, betas, running, self.eps, dtype)
        else:
            out, means, variances, rstds = bn_sum.bn_sum_forward(ys, gammas, betas, self.eps, self._out_dtype(ys))
        if running is None:
            update(means, variances)
        return out, ys, means, variances, rstds

    def _out_dtype(self, ys: list[Tensor]) -> torch.dtype | None:
        return None if self.dtype == ys[0].dtype else self.dtype

    def merged(self, weights: Sequence[Tensor]) -> Tensor:
        """The kernel whose convolution is the sum of all branches'."""
        given = iter(weights)
        kernels = [
            next(given) if convolved else identity_kernel(weights[0], self.geometry.groups)
            for _, convolved in self.branches
        ]
        return merge_kernels(kernels, [taps for taps, _ in self.branches], self.geometry)

    def definition(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """out but for the βs, of x, the weights and the γs, by eager formulas."""
        weights, gammas, _ = self.split(tensors)
        out = torch.zeros((), dtype=self.conv_dtype, device=x.device)
        for b, y in enumerate(self.maps(x, weights)):
            norm = Norm(gammas[b] if gammas else None, None, None, None, None, self.eps[b], None, True)
            out = out + batch_norm(y, norm)
        return out

    def map_gradients(
        self,
        grad: Tensor,
        x: Tensor,
        kept: list[Tensor],
        means: Tensor,
        rstds: Tensor,
        gammas: list[Tensor],
        needs_dy: list[bool],
        owns: bool,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """(the dy_b that are needed, every dγ, dβ) from the convolutions' maps; `owns`: over their memory."""
        if self.is_summed or all(convolved for _, convolved in self.branches):
            ys, targets = kept, kept
        else:
            seen, given = x.to(self.conv_dtype), iter(kept)
            ys, targets = [], []
            for place, (_, convolved) in zip(self.places, self.branches, strict=True):
                y = next(given) if convolved else bn_sum.like(place.apply(seen), kept[0])
                ys.append(y)
                targets.append(y if convolved else torch.empty_like(y))  # x is never overwritten
        if not owns:
            found, dgammas, dbeta = bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, needs_dy)
            return list(found), dgammas, dbeta
        dys = [target for target, need in zip(targets, needs_dy, strict=True) if need]
        dgammas, dbeta = bn_sum.bn_sum_backward_(grad, ys, means, rstds, gammas, needs_dy, dys)
        return dys, dgammas, dbeta

    def needs_dy(self, needs_x: bool, needs_w: Sequence[bool]) -> list[bool]:
        """Which of the maps have a gradient that something needs."""
        if self.is_summed:
            return [needs_x or any(needs_w)]
        given = iter(needs_w)
        return [needs_x or (convolved and next(given)) for _, convolved in self.branches]

    def split(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any], list[Any]]:
        """(weights, γs, βs) of what is passed in this order."""
        n = sum(convolved for _, convolved in self.branches)
        return tensors[:n], list(tensors[n : n + self.affine]), list(tensors[n + self.affine :])


def _composed(config: StepConfig, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, means, variances) from operators that torch.compile can trace and differentiate."""
    if config.phases != ALL_TRITON:  # the gradient of its operator is by Triton too
        config = config._replace(phases=ALL_LIBRARY)
    # AOTInductor of torch 2.10 and 2.11 hands an operator another dtype than it is given: it is given none.
    given = config._replace(dtype=config.conv_dtype) if torch.compiler.is_exporting() else config
    with nodes.without_autocast(x.device.type):
        out, _, means, variances, _ = given.forward(x, *config.split(tensors))
    return out.to(config.dtype), means, variances


@functools.cache
def _keep_freed_memory() -> None:
    """Has glibc keep freed maps for the next step, up to 64 MiB, where it would hand them back to the system.

    Its thresholds follow the largest block ever freed: one of just under 32 MiB, never touched, raises them to
    their maximum for good, as freeing a map of that size would. Otherwise a step of a few 8 MB maps faults in
    thousands of fresh pages, which costs as much as its arithmetic.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


class _Step(torch.autograd.Function):
    """The same in one node, which knows that nobody else needs the y_b."""

    @staticmethod
    def forward(
        ctx: Any, config: StepConfig, update: Update, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, gammas, betas = config.split(tensors)
        # Nothing here is differentiated: calls need not pass the dispatcher's autograd layer.
        with nodes.without_autocast(x.device.type), below_autograd():
            out, ys, means, variances, rstds = config.step(x, weights, gammas, betas, update)
        ctx.config = config
        # A hook on saved tensors may keep what it was given.
        ctx.owns_maps = top_saved_tensors_hooks(True) is None
        kept = (
            ys
            if config.is_summed
            else [y for y, (_, convolved) in zip(ys, config.branches, strict=True) if convolved]
        )
        ctx.save_for_backward(x, *weights, *gammas, means, rstds, *kept)
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
        weights, gammas, rest = config.split(tuple(saved))
        means, rstds, *kept = rest
        # Autograd casts what is returned to the inputs' dtypes.
        with nodes.without_autocast(x.device.type):
            if nodes.wants_definition(grad):
                inputs = (x, *weights, *gammas)
                definition = functools.partial(config.definition, *inputs)
                return None, None, *nodes.gradients(definition, inputs, needs[2:], grad)
            needs_x, needs_w = needs[2], config.split(needs[3:])[0]
            needs_dy = config.needs_dy(needs_x, needs_w)
            grad = bn_sum.like(grad, kept[0])
            owns = ctx.owns_maps and not keeps_graph()
            with below_autograd():
                dys, dgammas, dbeta = config.map_gradients(grad, x, kept, means, rstds, gammas, needs_dy, owns)
            dx, dws = convolution_gradients(config, dys, x, weights, needs_x, needs_w)
        of_gammas = dgammas.unbind() if config.affine else ()
        return None, None, dx, *dws, *of_gammas, *[dbeta] * (len(needs) - 3 - len(weights) - config.affine)


def convolution_gradients(
    config: StepConfig,
    dys: list[Tensor],
    x: Tensor,
    weights: tuple[Tensor, ...],
    needs_x: bool,
    needs_w: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx, every dW_b), None where not needed; dys holds the gradients of the maps with work to do."""
    if config.is_summed:
        return _gradients_of_the_sum(config, dys, x, weights, needs_x, needs_w)
    x, geometry = x.to(config.conv_dtype), config.geometry
    weights = tuple(weight.to(config.conv_dtype) for weight in weights)
    found: list[tuple[Placement, bool, Tensor | None]] = []
    given = iter(dys)
    for place, (_, convolved), need in zip(
        config.places, config.branches, config.needs_dy(needs_x, needs_w), strict=True
    ):
        found.append((place, convolved, next(given) if need else None))
    by_branch = [dy for _, convolved, dy in found if convolved]
    places = [place for place, convolved, _ in found if convolved]
    dx: Tensor | None = None
    for place, convolved, dy in found:
        if dy is not None and not convolved:  # the identity's gradient is dx's first summand
            dx = _added(dx, dy, place, x)
    dws: list[Tensor | None] = [None] * len(weights)
    if TRITON in config.phases:
        from . import triton_phases

        if needs_x and config.phases.dgrad == TRITON:
            dx, needs_x = triton_phases.input_grad(dys, weights, config.window, x.shape[2:]), False
        if any(needs_w) and config.phases.wgrad == TRITON:
            dws = triton_phases.weight_grads(x, by_branch, weights, config.window, needs_w)
            needs_w = (False,) * len(weights)
    for b, (dy, place, weight, need) in enumerate(zip(by_branch, places, weights, needs_w, strict=True)):
        if dy is None or not (needs_x or need):
            continue
        needs_dx = needs_x and not (
            dx is not None and add_input_gradient(dx, dy, weight, place, geometry.stride, geometry.groups)
        )
        seen = place.apply(x)
        if need:
            dws[b] = column_weight_gradient(dy, seen, place, geometry.stride, geometry.groups)
        needs_dw = need and dws[b] is None
        if not (needs_dx or needs_dw):
            continue
        dx_b, dw, _ = torch.ops.aten.convolution_backward.default(
            dy,
            seen,
            weight,
            None,
            geometry.stride,
            place.padding,
            place.dilation,
            False,
            (0, 0),
            geometry.groups,
            (needs_dx, needs_dw, False),
        )
        if needs_dw:
            dws[b] = dw
        if needs_dx:
            dx = _added(dx, dx_b, place, x)
    return dx, dws


def _added(dx: Tensor | None, dx_b: Tensor, place: Placement, x: Tensor) -> Tensor:
    """dx and the gradient of what a branch sees of x; the first one's own memory where it sees all of it."""
    if dx is None and not any(place.edges):
        return dx_b
    return place.add_adjoint(torch.zeros_like(x) if dx is None else dx, dx_b)


def _gradients_of_the_sum(
    config: StepConfig,
    dys: list[Tensor],
    x: Tensor,
    weights: tuple[Tensor, ...],
    needs_x: bool,
    needs_w: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:
    # One convolution by the summed kernel; its weight gradient holds every branch's.
    whole = config.geometry.whole
    merged = config._replace(branches=((whole, True),), places=(config.geometry.placement(whole),))
    kernel = config.merged(weights)
    dx, (dw,) = convolution_gradients(merged, dys, x, (kernel,), needs_x, (any(needs_w),))
    if dw is None:
        return dx, [None] * len(weights)
    taps = [taps for taps, convolved in config.branches if convolved]
    return dx, [tap_view(dw, own).clone() if need else None for own, need in zip(taps, needs_w, strict=True)]


class Inputs(NamedTuple):
    """A step's tensors: weights one a convolution, biases and the rest one a batch norm.

    There may be no γ or no β at all.
    """

    branches: Branches
    weights: list[Tensor]
    biases: list[Tensor | None]
    norms: list[Norm]
    gammas: list[Tensor]
    betas: list[Tensor]
    eps: list[float]
    dtype: torch.dtype  # of the output


def inputs_of(x: Tensor, step: Step) -> Inputs:
    """The step's tensors."""
    norms = step.norms
    weights = [branch.weight for branch in step.branches if branch.weight is not None]
    gammas = _all_or_none([norm.gamma for norm in norms], 1.0)
    betas = _all_or_none([norm.beta for norm in norms], 0.0)
    biases = [branch.bias for branch in step.branches]
    if step.norm is not None:
        given = [bias for bias in biases if bias is not None]
        biases = [functools.reduce(torch.add, given) if given else None]
    if any(bias is not None and bias.requires_grad for bias in biases):
        # The bias shifts a mean that is subtracted again: its gradient is zero, but it has one.
        betas = betas or [torch.zeros_like(weights[0][:, 0, 0, 0]) for _ in norms]
        betas = [beta if bias is None else beta + 0 * bias for beta, bias in zip(betas, biases, strict=True)]
    return Inputs(
        branches_of(step),
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


def config_of(
    geometry: Geometry,
    branches: Branches,
    eps: Sequence[float],
    affine: int,
    dtype: torch.dtype,
    device: str,
    phases: Phases = ALL_LIBRARY,
) -> StepConfig:
    """The config of a step; `affine` says how many γ there are, `dtype` is the output's."""
    make = _make if torch.compiler.is_compiling() else _cached  # Dynamo looks through a cache, and warns
    return make(geometry, branches, tuple(eps), affine, dtype, convolution_dtype(dtype, device), phases)


def _make(
    geometry: Geometry,
    branches: Branches,
    eps: tuple[float, ...],
    affine: int,
    dtype: torch.dtype,
    conv_dtype: torch.dtype,
    phases: Phases,
) -> StepConfig:
    places = tuple([geometry.placement(taps) for taps, _ in branches])
    window = tuple(Window.of(geometry, [taps for taps, _ in branches]).flatten()) if TRITON in phases else ()
    return StepConfig(geometry, branches, places, eps, affine, dtype, conv_dtype, phases, window)


_cached = functools.lru_cache(4096)(_make)


def forward(x: Tensor, step: Step) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros)."""
    return mixed.forward(lambda x, step: run(x, step, phases_of(step, x)), x, step)


def run(x: Tensor, step: Step, phases: Phases) -> Tensor:
    """forward() under this assignment of its phases."""
    geometry = step.geometry
    size = geometry.output_size(x.shape[2], x.shape[3])
    count = x.shape[0] * size[0] * size[1]
    inputs = inputs_of(x, step)
    config = config_of(
        geometry, inputs.branches, inputs.eps, len(inputs.gammas), inputs.dtype, x.device.type, phases
    )
    update = Update(inputs.norms, count, inputs.biases)
    tensors = (x, *inputs.weights, *inputs.gammas, *inputs.betas)
    if not torch.compiler.is_compiling():
        if phases == ALL_TRITON:
            from .triton_node import TritonStep  # Triton is slow to import

            return TritonStep.apply(config, update, *tensors)
        if x.is_cpu:
            _keep_freed_memory()
        if node.suits(config, x, inputs):
            return node.run(config, x, inputs, True)
        return _Step.apply(config, update, *tensors)[0]
    out, means, variances = _composed(config, *tensors)
    with torch.no_grad():
        update(means, variances)
    return out


class Variant(NamedTuple):
    """This backend under one assignment of its phases, as a timer times it."""

    NAME: str
    phases: Phases

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """One step."""
        return mixed.forward(lambda x, step: run(x, step, self.phases), x, step)


def variants(problem: Problem) -> list[Variant]:
    """This backend under every assignment of its phases; under its own name where there is but one."""
    found = assignments(problem)
    return [Variant(NAME if len(found) == 1 else label(phases), phases) for phases in found]


def _all_or_none(tensors: list[Tensor | None], missing: float) -> list[Tensor]:
    """The tensors with constants for the missing ones; [] where all are missing."""
    given = [t for t in tensors if t is not None]
    return [torch.full_like(given[0], missing) if t is None else t for t in tensors] if given else []
