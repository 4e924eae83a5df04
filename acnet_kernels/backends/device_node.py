"""A step of `branches` on CUDA as the C++ node of csrc/node/device.h.

It takes a step whose convolutions are all Triton's or all the library's, with Triton's batch-norm passes, on
tensors for which a direction's launches are recorded (ops/launch.py), and asks here which routine that is. Python's
nodes compute the same; they take, and record, what is not recorded, and what only the definition differentiates.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops import launch, triton_block, triton_step
from ..ops.epilogue import ACTIVATIONS
from ..ops.running import Running
from ..ops.triton_bn_sum import Following
from ..ops.triton_conv import precision_of
from ..spec import Epilogue
from ..steps import assignment
from ..steps.assignment import ALL_LIBRARY, ALL_TRITON
from . import node
from .branches import MapsStep
from .triton_node import TritonStep

if TYPE_CHECKING:
    from ..spec import Problem
    from ..steps.maps import StepConfig


def suits(config: StepConfig, problem: Problem) -> bool:
    """Whether the node computes this step, which has a batch norm a branch."""
    return (
        config.phases in (ALL_LIBRARY, ALL_TRITON)
        and config.conv_dtype == config.dtype != torch.float64
        and problem.channels_last
    )


@functools.cache
def number(config: StepConfig, momenta: tuple[float, ...], betas: int) -> int:
    """The number of a step with so many βs; kept for good, as a graph may be."""
    by_triton = config.phases == ALL_TRITON
    return node.NODE.add_on_device(node.as_given(config, betas, True), by_triton, Launches(config, momenta, betas))


class _Context(NamedTuple):
    """What Python's nodes read of theirs, in backward."""

    config: StepConfig
    activation: str
    owns_maps: bool
    after: int
    saved_tensors: list[Tensor]
    needs_input_grad: tuple[bool, ...]


class Launches:
    """A step's directions as routines, and Python's backward."""

    def __init__(self, config: StepConfig, momenta: tuple[float, ...], betas: int) -> None:
        self._config, self._momenta, self._betas = config, momenta, betas
        self._routines: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # by what is asked for
        # A routine's constants are how many tensors there are, and of which dtype: these stand for them.
        self._tensor = torch.empty(0, dtype=config.dtype)
        self._finishes = [config.finishes(Epilogue(name, None), assignment.DEVICE) for name in ACTIVATIONS]

    def forward(self, activation: int, device: int) -> tuple[int, int] | None:
        """(number, stream) of the forward for replay; None where Python is to do it."""
        return self._known(device, self._forward, ACTIVATIONS[activation]) if self._finishes[activation] else None

    def backward(
        self,
        activation: int,
        device: int,
        needs: list[bool],
        needs_residual: bool,
        overwrite: bool,
        is_told: bool,
    ) -> tuple[int, int] | None:
        """Likewise of the backward.

        Args:
            activation: its number.
            device: its index.
            needs: which of x, the weights, the γs and the βs need a gradient.
            needs_residual: whether the residual does.
            overwrite: whether the maps are written over.
            is_told: whether the activation's gradient takes a map besides (ops/epilogue.py's `kept`).
        """
        name = ACTIVATIONS[activation]
        return self._known(device, self._backward, name, (*needs,), needs_residual, overwrite, is_told)

    def gradients(
        self,
        activation: int,
        saved: list[Tensor],
        needs: list[bool],
        needs_residual: bool,
        owns_maps: bool,
        grad: Tensor,
    ) -> list[Tensor | None]:
        """Of x, the weights, the γs, the βs and the residual, by Python's node."""
        of: Any = TritonStep if self._config.phases == ALL_TRITON else MapsStep
        after = self._betas + 1 if activation else 0
        context = (self._config, ACTIVATIONS[activation], owns_maps, after, saved)
        _, _, _, dr, *found = of.backward(_Context(*context, (False, False, False, needs_residual, *needs)), grad)
        return [*found, dr]

    def _known(self, device: int, make: Any, *asked: Any) -> tuple[int, int] | None:
        key = (make.__name__, precision_of(self._config.dtype), *asked)
        routine = self._routines.get(key)
        if routine is None:
            function, _, *constants = make(*asked)
            routine = self._routines[key] = function, tuple(constants)
        return launch.known(*routine, device)

    def _forward(self, activation: str) -> tuple[Any, ...]:
        config, t = self._config, self._tensor
        weights, ys, gammas, betas = self._lists()
        norms = [t] * len(config.eps)
        running = Running(norms, norms, norms, (), self._momenta)
        if config.phases == ALL_TRITON:
            of_step = (t, weights, gammas, betas, running, config.eps, config.window)
            return triton_block.forward_routine(*of_step, None, activation)
        return triton_step.sum_routine(ys, gammas, betas, running, config.eps, None, None, activation)

    def _backward(
        self, activation: str, needs: tuple[bool, ...], needs_residual: bool, overwrite: bool, is_told: bool
    ) -> tuple[Any, ...]:
        config, t = self._config, self._tensor
        weights, ys, gammas, betas = self._lists()
        needs_x, needs_w = needs[0], needs[1 : 1 + len(weights)]
        kept, writes_residual = t if is_told else None, needs_residual and activation != ""
        if config.phases == ALL_TRITON:
            args = (t, t, weights, gammas, betas, t, t, ys, config.window, needs_x, needs_w, overwrite, kept)
            return triton_step.backward_routine(*args, activation, writes_residual)
        needs_dy = config.needs_dy(needs_x, needs_w)
        dys = [t] * sum(needs_dy) if overwrite or activation else []
        following = Following(activation, betas if activation else (), kept, t if writes_residual else None)
        return triton_step.sum_backward_routine(t, ys, t, t, gammas, needs_dy, dys, following)

    def _lists(self) -> tuple[list[Tensor], ...]:
        config, t = self._config, self._tensor
        weights = [t] * sum(convolved for _, convolved in config.branches)
        return weights, [t] * len(config.branches), [t] * config.affine, [t] * self._betas
