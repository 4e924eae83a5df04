"""Nothing kept but x, for any geometry: `branches`, whose maps are computed a second time for backward.

On CUDA, but for float64, the forward stores no map either. The statistics are one Triton pass; out is one k×k
convolution with the kernels folded by them, z = Σ_b (s_b/s)·W_b * x, s the largest of the |s_b|, normalised:
s·(z − its mean) + Σ_b β_b. Of one branch alone z is y_b, bit for bit. Exactly three batch norms' training semantics
everywhere.

Three more convolutions a step, on CUDA four: this runs on request, and under the memory saver where `moments` does
not surely need less.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..spec import NOTHING, Epilogue, Problem, Step, prefers_channels_last
from ..steps import recompute as ops
from ..steps.batchnorm import update_running
from ..steps.convolution import computed_directly, convolution_dtype
from ..steps.epilogue import finish
from ..steps.packed import pack, pack_taps
from . import branches, mixed, node, nodes

NAME = "recompute"


def declines(problem: Problem) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    return branches.declines(problem)


def saved_bytes(problem: Problem) -> int:
    """Bytes of maps kept for backward: x as it came."""
    inputs = math.prod(problem.shape) * problem.input_dtype.itemsize if problem.grad else 0
    return inputs + mixed.saved_bytes(problem)


def transient_bytes(problem: Problem) -> int:
    """Bytes of maps that a step holds at most besides what it keeps, its output and its gradients among them."""
    directly = computed_directly(mixed.inner(problem))
    dtype = problem.dtype if directly else convolution_dtype(problem.dtype, problem.device)
    if problem.grad and dtype != problem.dtype:  # the maps are counted there: it widens what it keeps
        return branches.transient_bytes(problem)
    inner = mixed.inner(problem)
    maps = (inner.normalised_maps - branches.maps_again(inner)) * problem.map_bytes(dtype)[1]
    return maps + branches.transient_bytes(problem)


def forward(x: Tensor, step: Step, epilogue: Epilogue = NOTHING) -> Tensor:
    """One step on x (N×C×H×W, already padded where the padding mode is not zeros), and what follows it."""
    return mixed.forward(_forward, x, step, epilogue)


def _forward(x: Tensor, step: Step, epilogue: Epilogue) -> Tensor:
    size = step.geometry.output_size(x.shape[2], x.shape[3])
    inputs = branches.inputs_of(x, step)
    if not torch.compiler.is_compiling():
        config = inputs.config(step.geometry, x.device.type)
        number = node.number_of(config, x, inputs, False)
        if number is not None:
            return node.run(number, x, inputs, epilogue)
    if torch.compiler.is_exporting():  # so that the operator is given no dtype, as in branches._composed
        x = x.to(inputs.dtype)
    arguments = (
        x,
        inputs.weights,
        inputs.gammas,
        inputs.betas,
        inputs.eps,
        pack_taps(inputs.branches, inputs.normed),
        pack(step.geometry),
        None if inputs.dtype == x.dtype else inputs.dtype,
        prefers_channels_last(x, inputs.weights[0]),
    )
    count = x.shape[0] * size[0] * size[1]
    update = functools.partial(update_running, inputs.norms, count=count, biases=inputs.biases)
    return finish(nodes.run(ops.RECORDED, arguments, update), epilogue)
