"""Chooses the backend for a step and says why."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from ..ops import bn_sum
from ..spec import Problem
from . import branches, eager, folded, moments, recompute, synced

# In order of preference: 'auto' takes the first that pays, so what follows eager only on request.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (folded, branches, eager, moments, recompute)}
CHOICES = ("auto", "memory_saver", *BACKENDS)

_saving = False


class Plan(NamedTuple):
    """The backend that runs a step, and why."""

    backend: ModuleType
    reason: str


def check_choice(backend: str) -> str:
    """backend itself; ValueError where it names none."""
    if backend not in CHOICES:
        raise ValueError(f"backend must be one of {CHOICES}, got {backend!r}")
    return backend


@contextlib.contextmanager
def memory_saver(enabled: bool = True) -> Iterator[None]:
    """Within it, blocks of backend 'auto' use `moments`, or else `recompute`, where that keeps fewer bytes.

    Process-wide, so that replicas in other threads follow. The same for one block: backend='memory_saver'.
    """
    global _saving
    before, _saving = _saving, enabled
    try:
        yield
    finally:
        _saving = before


def choose(problem: Problem, requested: str = "auto") -> Plan:
    """The backend for problem: the requested one unless it declines, else the first that pays."""
    forced = _forced(problem)
    if forced is not None:
        other = requested not in ("auto", forced.backend.NAME)
        return forced._replace(reason=f"{requested} was requested but {forced.reason}") if other else forced
    refused = ""
    if requested == "memory_saver" or (requested == "auto" and _saving):
        plan = _saving_plan(problem)
        if plan is not None:
            return plan
    elif requested != "auto":
        module = BACKENDS[requested]
        why = module.unavailable() or module.declines(problem)
        if why is None:
            return Plan(module, "requested")
        refused = f"{requested} was requested but declines: {why}; "
    for module in BACKENDS.values():
        if module.unavailable() is None and module.declines(problem) is None:
            why = does_not_pay(module.NAME, problem)
            if why is None:
                return Plan(module, refused + REASONS[module.NAME])
            refused += f"{module.NAME} passed over: {why}; "
    raise AssertionError("eager declines nothing and always pays")


# Elements of an output map up to which `branches` gains nothing over eager on the CPU, by bytes an element: the
# convolutions, or the cost of a call, are then nearly all of the step.
SMALL_MAP = {2: 2**15, 4: 2**19, 8: 2**19}


def does_not_pay(backend: str, problem: Problem) -> str | None:
    """Why 'auto' passes over a backend that could compute the step, or None.

    The rules come from benchmarks/block.py; the measurements are in benchmarks/results.
    """
    if backend == "branches":
        if problem.device == "cuda":
            return "its batch-norm sums have no CUDA kernels"
        small = SMALL_MAP[problem.dtype.itemsize]
        if problem.output_bytes // problem.dtype.itemsize <= small:
            return f"maps of {small} elements or fewer are as fast in eager"
        if bn_sum.MISSING is not None:
            if not torch.compiler.is_compiling():
                _warn_without_extension(bn_sum.MISSING)
            return "its batch-norm sums are slow without the C++ extension"
    return None


@functools.cache
def _warn_without_extension(why: str) -> None:
    warnings.warn(f"training steps run on the eager backend, which is slower: {why}", stacklevel=2)


def _saving_plan(problem: Problem) -> Plan | None:
    for module in (moments, recompute):
        if module.unavailable() or module.declines(problem):
            continue
        kept, usual = module.saved_bytes(problem), eager.saved_bytes(problem)
        if kept >= usual:
            continue
        if torch.compiler.is_compiling():  # a number in the text would tie the graph to one batch size
            return Plan(module, "memory saver")
        return Plan(module, f"memory saver: keeps {kept:,} bytes for backward, {usual - kept:,} fewer than eager")
    return None


def _forced(problem: Problem) -> Plan | None:
    """The plan of the steps that one way alone computes, whatever is requested."""
    if problem.transformed:
        return Plan(eager, "inside a torch.func transform only the definition has the rules that are needed")
    if problem.synced:
        return Plan(synced, "SyncBatchNorm's statistics span processes: one collective forward, one backward")
    return None


REASONS = {
    "folded": "running statistics normalise, so one folded convolution is exact",
    "branches": "fused batch-norm sums move less memory than three batch norms and two additions",
    "eager": "the definition; no faster path covers this step",
}
