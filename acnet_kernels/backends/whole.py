"""A step that is one operator each way, by the C++ node or Python's: dense `moments` and depthwise blocks."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..spec import NOTHING, Epilogue, Step, prefers_channels_last
from ..steps import depthwise, moments
from ..steps.batchnorm import update_running
from ..steps.convolution import convolution_dtype
from ..steps.epilogue import NUMBERS, finish
from ..steps.packed import pack, pack_taps
from . import branches, node, nodes


def forward(x: Tensor, step: Step, is_depthwise: bool, epilogue: Epilogue = NOTHING) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros), and what follows it."""
    inputs = branches.inputs_of(x, step)
    if not torch.compiler.is_compiling():
        if x.is_cpu:
            branches.keep_freed_memory()
        if node.takes(x, inputs):
            return node.run(_number(x, step, inputs, is_depthwise), x, inputs, epilogue)
    x, geometry = x.to(inputs.dtype), step.geometry
    channels_last = prefers_channels_last(x, inputs.weights[0])
    after: tuple[Any, ...] = ()
    if is_depthwise:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        residual = None if epilogue.residual is None else epilogue.residual.contiguous(memory_format=layout)
        after = residual, NUMBERS[epilogue.activation]
    arguments = (
        x,
        inputs.weights,
        inputs.gammas,
        inputs.betas,
        inputs.eps,
        pack_taps(inputs.branches, inputs.normed),
        pack(geometry),
        *(() if is_depthwise else (convolution_dtype(x.dtype, x.device.type),)),
        channels_last,
        *after,
    )
    count = x.shape[0] * math.prod(geometry.output_size(x.shape[2], x.shape[3]))
    recorded = depthwise.RECORDED if is_depthwise else moments.RECORDED
    update = functools.partial(update_running, inputs.norms, count=count, biases=inputs.biases)
    out = nodes.run(recorded, arguments, update)
    return out if is_depthwise else finish(out, epilogue)


def number(x: Tensor, step: Step, is_depthwise: bool) -> int | None:
    """Of the step in the node, None where that does not take it."""
    inputs = branches.inputs_of(x, step)
    return _number(x, step, inputs, is_depthwise) if node.takes(x, inputs) else None


def _number(x: Tensor, step: Step, inputs: branches.Inputs, is_depthwise: bool) -> int:
    return node.whole_number(inputs.config(step.geometry, x.device.type), len(inputs.betas), is_depthwise)
