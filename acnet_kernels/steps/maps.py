"""A step's maps and their gradients, by the library's convolutions or by Triton's kernels for all branches at once.

Forward: y_b = W_b * x. Backward, of the dy_b: dx summed within the library's convolutions where it can
(convolution.py), in place otherwise; the identity's map is x, and its dy the first summand of dx.

A batch norm after the sum of the branches needs that sum alone: it is added up from the branches' own convolutions,
as in eager (one convolution by the summed kernel would round larger terms), and differentiated as one convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry, Placement
from ..kernels.configs import MOST_TOGETHER
from ..kernels.window import MOST_BRANCHES, Window
from ..ops import bn_sum
from ..ops import epilogue as following
from ..ops.epilogue import ACTIVATIONS, is_clamp
from ..ops.running import NONE
from ..spec import NOTHING, Epilogue, Norm
from . import assignment
from .assignment import ALL_LIBRARY, TRITON, Phases, on_device
from .batchnorm import Tracked, Update, batch_norm
from .convolution import (
    add_input_gradient,
    column_weight_gradient,
    convolution_dtype,
    identity_kernel,
    merge_kernels,
    tap_view,
)
from .packed import Branches


class Finished(NamedTuple):
    """What the gradients take of an activation after the sum; see ops/epilogue.py. `dresidual` is written."""

    activation: str
    betas: list[Tensor]
    kept: Tensor | None
    dresidual: Tensor | None


class StepConfig(NamedTuple):
    """Everything about a step but its tensors."""

    geometry: Geometry
    branches: Branches
    places: tuple[Placement, ...]
    eps: tuple[float, ...]  # of each batch norm: the branches' own, then of the one after their sum
    normed: tuple[bool, ...]  # which branches have a batch norm of their own
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
            if first is not None and self.is_summed():
                first += y
                continue
            first = y if first is None else first
            ys.append(bn_sum.like(y, first))
        assert first is not None
        for i, (place, (_, convolved)) in enumerate(zip(self.places, self.branches, strict=True)):
            if not convolved and self.is_summed():
                first += place.apply(x)
            elif not convolved:
                ys[i] = bn_sum.like(place.apply(x), first)
        return [first] if self.is_summed() else [y for y in ys if y is not None]

    def is_triton(self) -> bool:
        """Whether Triton's kernels take these branches."""
        return all(convolved for _, convolved in self.branches) and (
            self.is_summed() or len(self.branches) <= MOST_BRANCHES
        )

    # No property: Dynamo of torch 2.10 knows none of a named tuple's.
    def is_summed(self) -> bool:
        """Whether the one batch norm follows the sum of several branches."""
        return not any(self.normed)

    def is_nested(self) -> bool:
        """Whether a batch norm follows the sum of branches of which some have their own."""
        return 0 < sum(self.normed) < len(self.eps)

    def cancelled(self) -> int:
        """How many of the first batch norms' βs a batch norm after the sum takes away again."""
        return sum(self.normed) if self.is_nested() else 0

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
        self,
        x: Tensor,
        weights: tuple[Tensor, ...],
        gammas: list[Tensor],
        betas: list[Tensor],
        update: Update | Tracked,
        epilogue: Epilogue = NOTHING,
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
        """forward() and what follows, not differentiable, and the update, which Triton's passes make themselves."""
        by_triton = self.phases.forward == TRITON
        ys = [] if by_triton else self.maps(x, weights)
        running = update.running() if by_triton or (on_device(x) and bn_sum.triton_takes(ys)) else None
        if by_triton:
            from . import triton_phases  # Triton is slow to import

            x, cast = x.to(self.conv_dtype), [weight.to(self.conv_dtype) for weight in weights]
            found = triton_phases.step(x, cast, gammas, betas, running or NONE, self.eps, self.window, epilogue)
            out, ys, means, variances, rstds = found
        elif running is not None:
            from . import triton_phases

            dtype = self._out_dtype(ys)
            of_sum = (ys, gammas, betas, running, self.eps, dtype)
            out, means, variances, rstds = triton_phases.bn_sum(*of_sum, epilogue)
        elif not epilogue.is_nothing():
            residual = None if epilogue.residual is None else bn_sum.like(epilogue.residual, ys[0])
            given = (ys, gammas, betas, self.eps, self._out_dtype(ys))
            done = following.bn_sum_epilogue_forward(*given, residual, ACTIVATIONS.index(epilogue.activation))
            out, means, variances, rstds = done
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
        given = iter(
            [
                Norm(gammas[b] if gammas else None, None, None, None, None, eps, None, True)
                for b, eps in enumerate(self.eps)
            ]
        )
        ys = self.maps(x, weights)
        if self.is_summed():
            return batch_norm(ys[0], next(given))
        out = torch.zeros((), dtype=self.conv_dtype, device=x.device)
        for y, own in zip(ys, self.normed, strict=True):
            out = out + (batch_norm(y, next(given)) if own else y)
        return batch_norm(out, next(given)) if self.is_nested() else out

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
        ys = self._every_map(x, kept)
        if not owns:
            found, dgammas, dbeta = bn_sum.bn_sum_backward(grad, ys, means, rstds, gammas, needs_dy)
            return list(found), dgammas, dbeta
        dys = self._targets(ys, needs_dy, True)
        dgammas, dbeta = bn_sum.bn_sum_backward_(grad, ys, means, rstds, gammas, needs_dy, dys)
        return dys, dgammas, dbeta

    def finished_gradients(
        self,
        grad: Tensor,
        x: Tensor,
        kept: list[Tensor],
        means: Tensor,
        rstds: Tensor,
        gammas: list[Tensor],
        needs_dy: list[bool],
        owns: bool,
        finished: Finished,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """map_gradients() where an activation follows the sum."""
        ys = self._every_map(x, kept)
        dys = self._targets(ys, needs_dy, owns)
        told = None if finished.kept is None else bn_sum.like(finished.kept, ys[0])
        dgammas, dbeta = following.bn_sum_epilogue_backward_(
            grad,
            ys,
            means,
            rstds,
            gammas,
            finished.betas,
            needs_dy,
            told,
            ACTIVATIONS.index(finished.activation),
            dys,
            finished.dresidual,
        )
        return dys, dgammas, dbeta

    def _every_map(self, x: Tensor, kept: list[Tensor]) -> list[Tensor]:
        if self.is_summed() or all(convolved for _, convolved in self.branches):
            return kept
        seen, given = x.to(self.conv_dtype), iter(kept)
        return [
            next(given) if convolved else bn_sum.like(place.apply(seen), kept[0])
            for place, (_, convolved) in zip(self.places, self.branches, strict=True)
        ]

    def _targets(self, ys: list[Tensor], needs_dy: list[bool], owns: bool) -> list[Tensor]:
        # Where each dy that is needed goes: the identity's map is x, never overwritten.
        own = [owns and (self.is_summed() or convolved) for _, convolved in self.branches]
        parts = zip(ys, needs_dy, own, strict=False)
        return [y if overwritten else torch.empty_like(y) for y, need, overwritten in parts if need]

    def finishes(self, epilogue: Epilogue, device: str) -> bool:
        """Whether what follows the sum is computed in its own passes, both ways."""
        smooth = epilogue.activation != "" and not is_clamp(epilogue.activation)
        return device != assignment.DEVICE or not smooth or len(self.eps) <= MOST_TOGETHER

    def needs_dy(self, needs_x: bool, needs_w: Sequence[bool]) -> list[bool]:
        """Which of the maps have a gradient that something needs."""
        if self.is_summed():
            return [needs_x or any(needs_w)]
        given = iter(needs_w)
        return [needs_x or (convolved and next(given)) for _, convolved in self.branches]

    def split(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any], list[Any]]:
        """(weights, γs, βs) of what is passed in this order."""
        n = sum(convolved for _, convolved in self.branches)
        return tensors[:n], list(tensors[n : n + self.affine]), list(tensors[n + self.affine :])


def convolution_gradients(
    config: StepConfig,
    dys: list[Tensor],
    x: Tensor,
    weights: tuple[Tensor, ...],
    needs_x: bool,
    needs_w: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx, every dW_b), None where not needed; dys holds the gradients of the maps with work to do."""
    if config.is_summed():
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
        needs_dx = needs_x and not (dx is not None and add_input_gradient(dx, dy, weight, place, geometry))
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
    merged = config._replace(branches=((whole, True),), places=(config.geometry.placement(whole),), normed=(True,))
    kernel = config.merged(weights)
    dx, (dw,) = convolution_gradients(merged, dys, x, (kernel,), needs_x, (any(needs_w),))
    if dw is None:
        return dx, [None] * len(weights)
    taps = [taps for taps, convolved in config.branches if convolved]
    return dx, [tap_view(dw, own).clone() if need else None for own, need in zip(taps, needs_w, strict=True)]


def config_of(
    geometry: Geometry,
    branches: Branches,
    eps: Sequence[float],
    normed: tuple[bool, ...],
    affine: int,
    dtype: torch.dtype,
    device: str,
    phases: Phases = ALL_LIBRARY,
) -> StepConfig:
    """The config of a step; `affine` says how many γ there are, `dtype` is the output's."""
    make = _make if torch.compiler.is_compiling() else _cached  # Dynamo looks through a cache, and warns
    return make(geometry, branches, tuple(eps), normed, affine, dtype, convolution_dtype(dtype, device), phases)


def _make(
    geometry: Geometry,
    branches: Branches,
    eps: tuple[float, ...],
    normed: tuple[bool, ...],
    affine: int,
    dtype: torch.dtype,
    conv_dtype: torch.dtype,
    phases: Phases,
) -> StepConfig:
    places = tuple([geometry.placement(taps) for taps, _ in branches])
    window = tuple(Window.of(geometry, [taps for taps, _ in branches]).flatten()) if TRITON in phases else ()
    return StepConfig(geometry, branches, places, eps, normed, affine, dtype, conv_dtype, phases, window)


_cached = functools.lru_cache(4096)(_make)
