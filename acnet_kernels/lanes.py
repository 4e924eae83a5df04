"""Lanes: what a block has done, a step or a fold, done again by one call into C++ where nothing has changed.

What a step depends on is read from the modules, described as a problem, looked up and handed on, tensor by tensor:
more work than a small layer's arithmetic. So a block keeps, by the shape of x, what it found (csrc/node/lane.h):
the class, settings and tensors' shapes of each submodule, and what else a choice hangs on. A lane compares all of
it with what is there now, and anything else goes the long way, which knows the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._torch_compat import dispatch_modes, has_global_hooks
from .backends import branches, folded, moments, node, planner, recompute, whole
from .functional import describe
from .ops.fuse_blocks import Arguments
from .ops.fusion import FoldEntry, append_branches, fold_arguments_as_it_is
from .spec import BRANCH, Problem, Step
from .steps.assignment import on_device
from .steps.epilogue import NUMBERS
from .submodules import Submodules, is_frozen, kernel_of

MOST = 16  # shapes that a block keeps a lane for
_KEPT = "_lanes"
_FOLDED = "_fold_reading"
_CONV_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")
_NORM_SETTINGS = ("training", "eps", "momentum", "track_running_stats")
_FOLD_SETTINGS = ("eps",)


def take(
    block: nn.Module, x: Tensor, backend: str, activation: str = "", residual: Tensor | None = None
) -> Tensor | None:
    """The block's step on x and what follows it (see spec.Epilogue) by a lane, None where none fits."""
    kept = block.__dict__.get(_KEPT)
    if kept is None or has_global_hooks():
        return None
    lanes, state = kept
    if state != (backend, planner.state()):
        del block.__dict__[_KEPT]
        return None
    lane = lanes.get(x.shape)
    return None if lane is None else lane(x, block._modules, NUMBERS[activation], residual)


def learn(block: nn.Module, given: Submodules, step: Step, x: Tensor, backend: str) -> None:
    """Keeps a lane for steps like this one, if the C++ node can run it or it is CUDA's, else that there is none."""
    if node.NODE is None or not (x.is_cpu or on_device(x)):
        return
    lanes, state = block.__dict__.get(_KEPT) or ({}, None)
    now = (backend, planner.state())
    if state != now or len(lanes) >= MOST:
        lanes = {}
    # Looking again and again would cost what a lane saves.
    about = (x.shape, x.dtype, x.requires_grad, block.training, *_surroundings(x.device.type))
    if about in lanes:
        return
    lane = _lane(given, step, x, backend)
    block.__dict__[_KEPT] = ({**lanes, **({about: None} if lane is None else {x.shape: lane})}, now)


def _surroundings(device: str) -> tuple[bool, bool, bool]:
    """What else most often decides whether there can be a lane."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled(device), dispatch_modes() == 0


def append_fold(block: nn.Module, a: Arguments) -> bool:
    """Appends the block's tensors to the fold operator's lists as they were appended before; False if it cannot."""
    kept = block.__dict__.get(_FOLDED)
    if not kept or has_global_hooks():
        return False
    reading, blocks, branches, eps = kept
    if not reading.append(block._modules, (*a[:5], [])):
        del block.__dict__[_FOLDED]
        return False
    a.blocks.extend(blocks)
    a.branches.extend(branches)
    a.eps.extend(eps)
    return True


def learn_fold(
    block: nn.Module, given: Submodules, kernel: tuple[int, int], groups: int, found: Sequence[FoldEntry]
) -> None:
    """Keeps how these entries of the block were read; only from the second fold on, as most are folded once.

    Where there can be no reading, False is kept: it is not looked for again.
    """
    if node.NODE is None or block.__dict__.get(_FOLDED) is False:
        return
    if _FOLDED not in block.__dict__:
        block.__dict__[_FOLDED] = None
        return
    own = Arguments.empty()
    append_branches(own, kernel, groups, found)
    read = None if own.conv_bias else _read(given, _FOLD_SETTINGS, counts=False)
    block.__dict__[_FOLDED] = read is not None and (node.NODE.Reading(*read), own.blocks, own.branches, own.eps)


def forget(state: dict[str, Any]) -> dict[str, Any]:
    """A block's __dict__ without its lanes, which are of this process."""
    return {name: value for name, value in state.items() if name not in (_KEPT, _FOLDED)}


def _lane(given: Submodules, step: Step, x: Tensor, backend: str) -> Any:
    problem = describe(x, step)
    if problem.norm != BRANCH or problem.transform or step.geometry.padding_mode != "zeros":
        return None
    chosen = planner.choose(problem, backend).backend
    train = chosen is not folded
    run: Any
    if on_device(x):
        # What is not measured cudnn.benchmark, once it is on, has the planner time first.
        untimed = backend == "auto" and not planner.measured(problem)
        run = _on_device(step, x, problem, untimed) if chosen is branches else None
    else:
        run = _number(step, x, chosen) if train else None if problem.grad else _fold(step, problem)
    read = None if run is None else _read(given, _NORM_SETTINGS, counts=train)
    if read is None:
        return None
    momenta = [norm.momentum for norm in step.norms] if train else []
    shape = (problem.shape[0], problem.out_channels, *problem.output_size)
    return node.NODE.Lane(run, x, shape, problem.dtype, node.NODE.Reading(*read), momenta)


def _number(step: Step, x: Tensor, chosen: Any) -> int | None:
    """Of the training step in the node, if it is one of its."""
    if chosen is moments:
        return whole.number(x, step, moments.computes_depthwise(x, step))
    if chosen not in (branches, recompute):
        return None
    inputs = branches.inputs_of(x, step)
    config = inputs.config(step.geometry, x.device.type)
    return node.number_of(config, x, inputs, chosen is branches)


def _on_device(step: Step, x: Tensor, problem: Problem, untimed: bool) -> Any:
    """The training step, by Python's function where the node does not take it."""
    from .backends import device_node  # Triton is slow to import

    again = branches.again(x, step)
    if again is None:
        return None
    betas = sum(norm.beta is not None for norm in step.norms)
    suits = device_node.suits(again.config, problem)
    number = device_node.number(again.config, again.momenta, betas) if suits else None
    return node.NODE.OnDevice(again, number, untimed)


def _fold(step: Step, problem: Problem) -> Any:
    """The step in eval."""
    if any(branch.bias is not None for branch in step.branches):
        return None
    arguments, place = fold_arguments_as_it_is(step), step.geometry.placement(step.geometry.whole)
    return node.NODE.Fold(
        step.geometry.stride,
        place.padding,
        place.dilation,
        step.geometry.groups,
        arguments.blocks,
        arguments.branches,
        arguments.eps,
        problem.channels_last,
    )


def _read(
    given: Submodules, norm_settings: tuple[str, ...], counts: bool
) -> tuple[list[Any], list[list[Any]]] | None:
    """The modules, and where among them their tensors are, as Reading takes them; None for other batch norms."""
    modules: list[tuple[Any, ...]] = []
    sources: list[list[tuple[Any, ...]]] = [[] for _ in range(6)]
    weights, gammas, betas, means, variances, counters = sources
    for container, module in zip(given.layout.containers, given.containers, strict=True):
        if not _add(modules, container.path, module, container.children):
            return None
    for path, module in zip(given.layout.idle, given.idle, strict=True):
        if not _add(modules, path, module, ()):
            return None
    for slot, conv, norm in zip(given.layout.slots, given.convs, given.norms, strict=True):
        if conv is not None:
            weights.append((len(modules), True, "weight", kernel_of(conv)[0]))
            modules.append(_module(slot.conv, conv, _CONV_SETTINGS, ("bias",)))
        if not isinstance(norm, nn.BatchNorm2d) or is_frozen(norm):
            return None
        if norm._modules and not _add(modules, slot.norm or (), norm, ()):
            return None
        affine, buffers = norm._parameters, norm._buffers
        for name, kind in (("weight", gammas), ("bias", betas)):
            if affine[name] is not None:
                kind.append((len(modules), True, name, affine[name]))
        kept = [("running_mean", means), ("running_var", variances)]
        for name, kind in [*kept, ("num_batches_tracked", counters)] if counts else kept:
            kind.append((len(modules), False, name, buffers[name]))
        none = tuple(name for name, tensor in affine.items() if tensor is None)
        modules.append(_module(slot.norm, norm, norm_settings, none))
    norms = len(means)
    return None if {len(gammas), len(betas)} - {0, norms} else (modules, sources)


def _add(
    modules: list[tuple[Any, ...]], path: tuple[str, ...], module: nn.Module | None, active: tuple[str, ...]
) -> bool:
    """Adds a module that is no source, and its children that must go on doing nothing; False if one is missing."""
    if module is None:
        return False
    modules.append(_module(path, module, (), (), tuple(module._modules)))
    idle = {name: child for name, child in module._modules.items() if name not in active}
    modules += [_module((*path, name), child, (), ()) for name, child in idle.items() if child is not None]
    return None not in idle.values()


def _module(
    path: tuple[str, ...] | None,
    module: nn.Module,
    settings: tuple[str, ...],
    none: tuple[str, ...],
    children: tuple[str, ...] = (),
) -> tuple[Any, ...]:
    own = module.__dict__
    missing = [(True, name) for name in none]
    return list(path or ()), type(module), len(own), {name: own[name] for name in settings}, missing, list(children)
