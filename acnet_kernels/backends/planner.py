"""Chooses the backend for a step and says why."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

import torch

from .._torch_compat import graph_task_id
from ..kernels.configs import MOST_TOGETHER
from ..ops import _extension
from ..ops.epilogue import is_clamp
from ..spec import MIXED, SUM, Problem
from . import (
    branches,
    eager,
    folded,
    moments,
    moments_depthwise,
    node,
    recompute,
    synced,
    synced_depthwise,
    timer,
    timing_cache,
)
from .device_info import Machine, this_machine

# In order of simplicity: where two are about as fast, 'auto' takes the first.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (folded, eager, branches, moments, recompute)}
FINISHING = (branches, recompute, moments)  # which compute what follows the sum too
CHOICES = ("auto", "memory_saver", *BACKENDS)

_saving = False
_requests: dict[object, bool] = {}  # of every open memory_saver(), in the order they were entered
_lock = threading.Lock()


class Choice(NamedTuple):
    """The backend that runs a step, and why."""

    backend: ModuleType
    reason: str


def state() -> tuple[bool, int]:
    """Changes whenever a choice may come out otherwise for the same problem in the same surroundings."""
    return _saving, timing_cache.version()


def check_choice(backend: str) -> str:
    """backend itself; ValueError where it names none."""
    if backend not in CHOICES:
        raise ValueError(f"backend must be one of {CHOICES}, got {backend!r}")
    return backend


@contextlib.contextmanager
def memory_saver(enabled: bool = True) -> Iterator[None]:
    """Within it, blocks of backend 'auto' use the backend whose training steps need the least memory.

    That is what a network of eight such blocks would hold at most: eight times what one keeps for backward, and
    once what a step needs besides. `explain()` shows both. The same for one block: backend='memory_saver'.

    Process-wide, so that replicas in other threads follow: of all that are open, in whichever threads, the one
    entered last decides, and leaving one changes nothing about the others.

    Args:
        enabled: False switches it off within.
    """
    request = object()
    _request(request, enabled)
    try:
        yield
    finally:
        _request(request, None)


def _request(request: object, enabled: bool | None) -> None:
    """Enters a request, or with None withdraws it."""
    global _saving
    with _lock:
        if enabled is None:
            del _requests[request]
        else:
            _requests[request] = enabled
        _saving = next(reversed(_requests.values()), False)


def choose(problem: Problem, requested: str = "auto") -> Choice:
    """The backend for problem: the requested one unless it declines, else the one that takes the least time."""
    forced = _forced(problem)
    if forced is not None:
        other = requested not in ("auto", forced.backend.NAME)
        return forced._replace(reason=f"{requested} was requested but {forced.reason}") if other else forced
    refused = ""
    if requested == "memory_saver" or (requested == "auto" and _saving):
        choice = _saving_choice(problem)
        if choice is not None:
            return choice
    elif requested != "auto":
        module = BACKENDS[requested]
        why = module.declines(problem)
        if why is None:
            return Choice(module, "requested")
        refused = f"{requested} was requested but declines: {why}; "
    if folded.declines(problem) is None:
        return Choice(folded, refused + REASONS["folded"])
    if torch.compiler.is_compiling():
        from . import constants  # slow to import, and only a compiler needs it

        name, why = constants.choice(*constants.as_constants(problem))
    else:
        name, why = decided(problem, _times_at_first_sight(problem))
    return Choice(BACKENDS[name], refused + why)


def where_finished(problem: Problem, choice: Choice, activation: str) -> str:
    """Where the activation after a step is computed, in words."""
    if choice.backend is moments and moments_depthwise.finishes(problem):
        return "in the convolution's own passes"
    fuses = problem.norm != MIXED and choice.backend in (branches, recompute)
    if problem.device == "cpu":
        fuses = fuses and not (choice.backend is recompute and (node.NODE is None or problem.norm == SUM))
    else:
        few = is_clamp(activation) or len(problem.batch_stats) <= MOST_TOGETHER
        fuses = fuses and choice.backend is branches and branches.unfused(problem) is None and few
    return "in the sum's own passes" if fuses else "after it, by PyTorch"


# Medians of interleaved runs differ by this much from one run to the next.
MARGIN = 0.03


def candidates(problem: Problem) -> list[str]:
    """The backends that 'auto' chooses from by time, the simplest first."""
    modules = [module for module in BACKENDS.values() if module is not folded]
    return [m.NAME for m in modules if m.declines(problem) is None]


def contenders(problem: Problem) -> list[timer.Contender]:
    """What there is to time: the candidates, but `branches` under every assignment of its phases."""
    found: list[timer.Contender] = []
    for name in candidates(problem):
        found.extend(branches.variants(problem) if name == branches.NAME else [BACKENDS[name]])
    return found


def measure(problem: Problem, autocast: bool, watch: Callable[..., dict[str, float]]) -> dict[str, float]:
    """What `watch`, a timer's function, measures of the contenders: name → milliseconds of a step.

    The time of `branches` is that of the fastest of its assignments, which are filed too, under phases.label.
    """
    found = watch(problem, contenders(problem), autocast)
    variants = [ms for name, ms in found.items() if name not in BACKENDS]
    return {**found, branches.NAME: min(variants)} if variants else found


def measured(problem: Problem) -> dict[str, float]:
    """Candidate → milliseconds of a step for problem, as far as measured on this machine."""
    known = timing_cache.lookup(problem, this_machine(problem.device))
    return {name: ms for name in candidates(problem) if known and (ms := known.milliseconds.get(name)) is not None}


def fastest(times: Mapping[str, float]) -> str:
    """The backend that beats every simpler one by the margin."""
    chosen = ""
    for name in BACKENDS:
        if name in times and (not chosen or times[name] * (1 + MARGIN) < times[chosen]):
            chosen = name
    return chosen


def decided(problem: Problem, timed: bool) -> tuple[str, str]:
    """(backend, why) by what is known about this machine now; `timed`: times the candidates first."""
    return _decided(problem, this_machine(problem.device), timing_cache.version(), timed, _extension.WHY_MISSING)


@functools.lru_cache(4096)
def _decided(problem: Problem, machine: Machine, version: int, timed: bool, missing: str) -> tuple[str, str]:
    """decided() on this machine, once for each version of what is known."""
    known = measured(problem)
    if timed and timing_cache.lookup(problem, machine) is None:
        found = measure(problem, torch.is_autocast_enabled(problem.device), timer.measure_apart)
        timing_cache.remember(problem, machine, found, timing_cache.FIRST_SIGHT)
        known = measured(problem)
    return decide(problem, known)


def decide(problem: Problem, known: Mapping[str, float]) -> tuple[str, str]:
    """(backend, why): the whole rule.

    Of the candidates' measured times, where there are any, the least. Else `branches` wherever it has fused passes:
    it does less than eager then, and takes the host less time.
    """
    if known:
        name = fastest(known)
        rest = "".join(f", {other} {ms:.3g}" for other, ms in known.items() if other != name)
        return name, f"{REASONS[name]}: measured {known[name]:.3g} ms{rest}"
    if moments.is_fastest(problem) and moments.declines(problem) is None:
        return moments.NAME, REASONS["depthwise" if moments_depthwise.takes(problem) else "pointwise"]
    why = branches.declines(problem) or branches.unfused(problem)
    if why is None:
        return branches.NAME, REASONS[branches.NAME]
    if branches.declines(problem) is None and problem.device == "cpu":
        _warn_without_extension(why)
    return eager.NAME, f"branches is passed over: {why}"


def _times_at_first_sight(problem: Problem) -> bool:
    """Whether the user welcomes timing (the switch is cuDNN's own) and now is a time for it.

    Inside a backward, where a checkpointed block runs, it is not: the timed one needs the thread that would wait.
    """
    return (
        problem.device == "cuda"
        and torch.backends.cudnn.benchmark
        and len(candidates(problem)) > 1
        and not torch.cuda.is_current_stream_capturing()
        and graph_task_id() == -1
    )


@functools.cache
def _warn_without_extension(why: str) -> None:
    warnings.warn(f"training steps run on the eager backend, which is slower: {why}", stacklevel=2)


BLOCKS_ALIKE = 8  # that a network is taken to have, where memory is to be saved
# In this order one is taken where it needs less than this share of the memory of the best so far: `recompute` where
# that is worth its time, and `moments`, mostly slower still, where it surely needs less.
SAVERS = {eager: 1.0, branches: 1.0, recompute: 0.95, moments: 0.8}


def network_bytes(module: ModuleType, problem: Problem) -> int:
    """What a network of BLOCKS_ALIKE blocks with this problem would hold at most in a step."""
    return BLOCKS_ALIKE * module.saved_bytes(problem) + module.transient_bytes(problem)


def _saving_choice(problem: Problem) -> Choice | None:
    """The one that needs the least memory; None where nothing is kept, or nothing but one convolution is done."""
    if not problem.grad or folded.declines(problem) is None:
        return None
    if torch.compiler.is_compiling():
        from . import constants  # as in choose()

        name, why = constants.saver(*constants.as_constants(problem))
    else:
        name, why = least(problem)
    return Choice(BACKENDS[name], why)


@functools.lru_cache(4096)
def least(problem: Problem) -> tuple[str, str]:
    """(backend, why) of the candidate that needs the least memory."""
    names, module = candidates(problem), eager
    for other, share in SAVERS.items():
        if other.NAME in names and network_bytes(other, problem) < share * network_bytes(module, problem):
            module = other
    if module is eager:
        return eager.NAME, "memory saver: no other backend needs less memory"
    kept = module.saved_bytes(problem)
    fewer = f"{eager.saved_bytes(problem) - kept:,} fewer than eager"
    besides = f"{module.transient_bytes(problem):,} besides while it runs"
    return module.NAME, f"memory saver: keeps {kept:,} bytes for backward, {fewer}, and {besides}"


def _forced(problem: Problem) -> Choice | None:
    """The choice of the steps that one way alone computes, whatever is requested."""
    if problem.transform:
        return Choice(eager, f"under {problem.transform} only the definition has the rules that are needed")
    if problem.synced:
        module = synced_depthwise if synced_depthwise.computes(problem) else synced
        return Choice(module, "SyncBatchNorm's statistics span processes: one collective forward, one backward")
    return None


REASONS = {
    "folded": "running statistics normalise, so one folded convolution is exact",
    "branches": "fused batch-norm sums move less memory than three batch norms and two additions",
    "eager": "no other backend gains on the definition",
    "moments": "one convolution, with statistics from the input's autocorrelation",
    "depthwise": "one pass over depthwise maps, whatever the number of branches",
    "pointwise": "one 1×1 convolution of few channels, whatever the number of branches",
    "recompute": "every branch's map computed twice, none kept",
}
