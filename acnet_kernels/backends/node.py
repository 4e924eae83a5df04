"""A step on the CPU as the C++ node of csrc/node, where that is built: one call.

It computes what `branches`, `recompute` or `moments` do, in the same order. It leaves to Python's nodes conv
biases, batch norms without running statistics or with cumulative ones, and modes that watch single operators; of
`branches` and `recompute` also steps whose sum is normalised, and maps so large that other ways to their gradients
pay.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._torch_compat import dispatch_modes
from ..ops import _extension
from ..ops.epilogue import ACTIVATIONS
from ..spec import NOTHING, Epilogue, prefers_channels_last
from ..steps.assignment import ALL_LIBRARY
from ..steps.convolution import accumulates, adding_pays, direct_pays
from ..steps.epilogue import NUMBERS
from ..steps.packed import pack, pack_taps
from . import nodes

if TYPE_CHECKING:
    from ..steps.maps import StepConfig
    from .branches import Inputs

NODE = _extension.NODE
_configs: dict[int, StepConfig] = {}


def takes(x: Tensor, inputs: Inputs) -> bool:
    """Whether the node takes a step on these tensors."""
    return (
        NODE is not None
        and x.is_cpu
        and not any(bias is not None for bias in inputs.biases)
        and all(
            norm.running_mean is not None and norm.num_batches_tracked is not None and norm.momentum is not None
            for norm in inputs.norms
        )
        and dispatch_modes() == 0
    )


def number_of(config: StepConfig, x: Tensor, inputs: Inputs, keeps_maps: bool) -> int | None:
    """The number of this step of `branches`, or without maps kept `recompute`, if the node is the faster way."""
    if config.phases != ALL_LIBRARY or config.is_summed() or not takes(x, inputs):
        return None
    channels_last = prefers_channels_last(x, inputs.weights[0])
    is_direct = computes_directly(x, inputs.weights[0], config)
    # Where convolution.add_input_gradient pays it is Python's step that knows how.
    if not is_direct and adding_pays(x.numel(), x.shape[1], config.conv_dtype, config.geometry):
        return None
    return _number(config, len(inputs.betas), keeps_maps, is_direct, channels_last)


def run(number: int, x: Tensor, inputs: Inputs, epilogue: Epilogue = NOTHING) -> Tensor:
    """The step of this number, and what follows it; running statistics are updated."""
    norms = inputs.norms
    return NODE.run(
        number,
        x,
        inputs.weights,
        inputs.gammas,
        inputs.betas,
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [norm.num_batches_tracked for norm in norms],
        [norm.momentum for norm in norms],
        NUMBERS[epilogue.activation],
        epilogue.residual,
    )


def computes_directly(x: Tensor, weight: Tensor, config: StepConfig) -> bool:
    """Whether a step that the node takes, or a compiled one, is computed by our own convolutions (csrc/direct.h).

    Args:
        weight: of any of its convolutions.
    """
    channels = x.shape[1], weight.shape[0]
    layout = prefers_channels_last(x, weight)
    return direct_pays(channels, x.numel() // x.shape[1], config.dtype, config.geometry, layout)


@functools.cache
def _number(config: StepConfig, betas: int, keeps_maps: bool, is_direct: bool, channels_last: bool) -> int:
    # Numbers are kept for good, as a graph may be.
    return _add(config, NODE.add(as_given(config, betas, keeps_maps, is_direct, channels_last)))


def as_given(
    config: StepConfig, betas: int, keeps_maps: bool, is_direct: bool = False, channels_last: bool = False
) -> Any:
    """The config as the node has it, of a step with so many βs.

    `is_direct`: by convolutions of our own, which return maps in channels_last where that is said.
    """
    places = []
    for place, (_, convolved) in zip(config.places, config.branches, strict=True):
        places.append((int(convolved), *place.padding, *place.dilation, *place.edges))
    return NODE.Config(
        config.geometry.stride,
        config.geometry.groups,
        places,
        config.eps,
        config.affine,
        betas,
        config.dtype if is_direct else config.conv_dtype,
        config.dtype,
        keeps_maps,
        pack_taps(config.branches, config.normed) if is_direct else [],
        pack(config.geometry) if is_direct else [],
        channels_last,
    )


@functools.cache
def whole_number(config: StepConfig, betas: int, is_depthwise: bool) -> int:
    """The number of a step of `moments` with so many βs."""
    found = NODE.configure_whole(
        pack_taps(config.branches, config.normed),
        pack(config.geometry),
        config.eps,
        config.affine,
        betas,
        config.cancelled(),
        sum(convolved for _, convolved in config.branches),
        config.conv_dtype,
        config.dtype,
        is_depthwise,
        accumulates(),
    )
    return _add(config, found)


def _add(config: StepConfig, number: int) -> int:
    _configs[number] = config
    return number


def _gradients(
    number: int,
    inputs: list[Tensor],
    needs: list[bool],
    grad: Tensor,
    activation: int,
    betas: list[Tensor],
    kept: Tensor | None,
) -> list[Tensor | None]:
    # Of x, the weights, the γs, the βs, and before an activation of the residual, where the node's will not do.
    if not nodes.wants_definition(grad):
        raise RuntimeError(f"a gradient of {type(grad).__name__} has no rule")
    config = _configs[number]
    definition = functools.partial(config.definition, *inputs)
    if activation == 0:
        return nodes.gradients(definition, inputs, needs, grad, config.cancelled())
    return nodes.finished_gradients(
        definition, inputs, needs, grad, ACTIVATIONS[activation], [*betas, kept], config.cancelled()
    )


if NODE is not None:
    NODE.attach(str(_extension.LIBRARY), _gradients)
