"""tune(): measures a model's own layers once; the planner takes the fastest backend for each from then on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .backends import planner, timer, timing_cache
from .backends.device_info import this_machine
from .conversion import Block, blocks_of
from .explanation import own_forward_reason, table, visit
from .observing import as_input
from .spec import Problem


@dataclass(frozen=True)
class LayerTimes:
    """Layers that compute the same step: their names, the step, backend → milliseconds, and the backend chosen."""

    names: tuple[str, ...]
    step: str
    milliseconds: Mapping[str, float]
    chosen: str


@dataclass(frozen=True)
class TuningReport:
    """What tune() measured, in the order the layers run, and the file it is kept in (None: only in this process).

    `left` are the blocks that were not measured: name → why. str() is a table.
    """

    layers: list[LayerTimes]
    left: Mapping[str, str]
    path: Path | None

    def __str__(self) -> str:
        backends = [name for name in planner.BACKENDS if any(name in layer.milliseconds for layer in self.layers)]
        rows = []
        for layer in self.layers:
            times = (f"{layer.milliseconds[b]:.3g}" if b in layer.milliseconds else "" for b in backends)
            rows.append((layer.names[0], str(len(layer.names)), layer.step, *times, layer.chosen))
        header = ("block", "alike", "step", *(f"{name}, ms" for name in backends), "chosen")
        lines = table(header, rows) if rows else ["no block has a choice"]
        lines += [f"{name}: {why}" for name, why in self.left.items()]
        return "\n".join([*lines, f"kept in {self.path or 'this process alone'}"])


def tune(model: nn.Module, example: Sequence[int] | Tensor) -> TuningReport:
    """Times every backend on every distinct step of model's blocks; the planner takes the fastest from then on.

    model runs once on example, in eval mode without gradients, to learn the steps' shapes, dtypes and layouts; each
    block counts in the mode it is in, so call model.train() first, inside the autocast that training has. Timed
    are medians of interleaved steps (forward, and backward where something needs a gradient) on random tensors.
    model is left as it was: parameters, buffers, gradients, modes, and torch's random state.

    The times are kept for this process and in the user's cache directory ($ACNET_KERNELS_CACHE, or acnet_kernels in
    $XDG_CACHE_HOME or ~/.cache), for this device, thread count, and versions of torch, Triton and this package;
    where that cannot be written, a warning says so. A backend is taken over a simpler one where it is 3% faster.

    Args:
        model: any module with blocks.
        example: an input like those of training, or its shape (zeros in the dtype and on the device of the first
            parameter). The batch size is part of a step.

    Raises:
        TypeError: example is neither.
        ValueError: model has no block.
    """
    blocks = {block: name or "(model)" for name, block in blocks_of(model).items()}
    if not blocks:
        raise ValueError(f"model must have a block to tune, this {type(model).__name__} has none; see convert()")
    x = as_input(model, example, "example")
    steps: dict[str, tuple[Problem, bool, list[str]]] = {}
    left = dict.fromkeys(blocks.values(), "does not run on this example in eval mode")

    def look(block: Block, t: Tensor) -> None:
        name, why = blocks[block], _no_choice(block, t)
        if why is not None:
            left[name] = why
            return
        left.pop(name, None)
        problem = block.plan(t)[0]
        autocast = torch.is_autocast_enabled(t.device.type)
        names = steps.setdefault(timing_cache.key(problem), (problem, autocast, []))[2]
        if name not in names:
            names.append(name)

    visit(model, x, blocks, look)
    layers = []
    machine = this_machine(x.device.type)
    found: timing_cache.Times = {}
    for key, (problem, autocast, names) in steps.items():
        times = planner.measure(problem, autocast, timer.measure)
        if not times:
            left |= dict.fromkeys(names, "the device has not the memory to time it")
            continue
        timing_cache.remember(problem, machine, times, timing_cache.TUNED)
        found[key] = times
        layers.append(LayerTimes(tuple(names), key, times, planner.choose(problem).backend.NAME))
    path = None
    if found:
        try:
            path = timing_cache.store(machine, found)
        except OSError as error:
            warnings.warn(f"the tuned times cannot be kept: {error}", stacklevel=2)
    return TuningReport(layers, left, path)


def _no_choice(block: Block, x: Tensor) -> str | None:
    """Why the planner has nothing to choose for block, or None."""
    if block.deploy:
        return "it is deployed"
    if block.backend != "auto":
        return f"its backend is {block.backend!r}"
    forced = own_forward_reason(block, x)
    if forced is not None:
        return f"it runs through its submodules: {forced}"
    problem, plan = block.plan(x)
    names = planner.candidates(problem)
    return (
        None if len(names) > 1 and plan.backend.NAME in names else f"{plan.backend.NAME} alone can: {plan.reason}"
    )
