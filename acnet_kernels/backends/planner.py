"""Chooses the backend for a step and says why."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

import torch

from .._torch_compat import graph_task_id
from ..ops import _extension
from ..spec import Problem
from . import branches, cost, eager, folded, moments, recompute, synced, timer, timing_cache
from .device_info import Machine, this_machine

# In order of simplicity: where two are about as fast, 'auto' takes the first.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (folded, eager, branches, moments, recompute)}
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


# Medians of interleaved runs differ by this much from one run to the next.
MEASURED_MARGINS = dict.fromkeys(BACKENDS, 0.03)


class Times(NamedTuple):
    """Backend → milliseconds of a step: what the cost model predicts, and what was measured (empty where not)."""

    predicted: Mapping[str, float]
    measured: Mapping[str, float]


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


def times(problem: Problem) -> Times:
    """What is known about the candidates' times for problem."""
    names, machine = candidates(problem), this_machine(problem.device)
    predicted = {name: ms for name in names if (ms := cost.predict(problem, name, machine.kind)) is not None}
    measured = timing_cache.lookup(problem, machine)
    return Times(
        predicted,
        {name: ms for name, ms in measured.milliseconds.items() if name in names} if measured else {},
    )


def fastest(times: Mapping[str, float], margins: Mapping[str, float]) -> str:
    """The backend that beats every simpler one by its margin; one without a margin never does."""
    chosen = ""
    for name in BACKENDS:
        if name in times:
            margin = margins.get(name, math.inf)
            if not chosen or times[name] * (1 + margin) < times[chosen]:
                chosen = name
    return chosen


def decided(problem: Problem, timed: bool) -> tuple[str, str]:
    """(backend, why) of the candidate that takes the least time, as far as is known; `timed`: finds out first."""
    return _decided(problem, this_machine(problem.device), timing_cache.version(), timed, _extension.WHY_MISSING)


@functools.lru_cache(4096)
def _decided(problem: Problem, machine: Machine, version: int, timed: bool, missing: str) -> tuple[str, str]:
    """decided() on this machine, once for each version of what is known."""
    known = times(problem)
    if timed and timing_cache.lookup(problem, machine) is None:
        measured = measure(problem, torch.is_autocast_enabled(problem.device), timer.measure_apart)
        timing_cache.remember(problem, machine, measured, timing_cache.FIRST_SIGHT)
        known = known._replace(measured=measured)
    name, why = decide(problem, machine.kind, known)
    if name == branches.NAME and problem.device != "cuda" and missing:
        _warn_without_extension(missing)
        without = Times(*({other: ms for other, ms in t.items() if other != branches.NAME} for t in known))
        name, why = decide(problem, machine.kind, without)
        why = f"branches passed over: its batch-norm sums are slow without the C++ extension; {why}"
    return name, why


def decide(problem: Problem, kind: str, known: Times) -> tuple[str, str]:
    """(backend, why) from what is known about the candidates' times on this kind of machine: the whole rule.

    Measured times decide where there are any, else predicted ones: a backend is taken where it beats every simpler
    one by a margin.
    """
    found, word = known.measured, "measured"
    margins: Mapping[str, float] = MEASURED_MARGINS
    if not found:
        found, word = known.predicted, "predicted"
        if eager.NAME not in found:
            return eager.NAME, f"the time of no {problem.dtype} step is known on {kind}"
        margins = cost.prices()[kind].margins
    name = fastest(found, margins)
    rest = "".join(f", {other} {ms:.3g}" for other, ms in found.items() if other != name)
    return name, f"{REASONS[name]}: {word} {found[name]:.3g} ms{rest}" if rest else REASONS[name]


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
        return Choice(synced, "SyncBatchNorm's statistics span processes: one collective forward, one backward")
    return None


REASONS = {
    "folded": "running statistics normalise, so one folded convolution is exact",
    "branches": "fused batch-norm sums move less memory than three batch norms and two additions",
    "eager": "no other backend gains on the definition",
    "moments": "one convolution, with statistics from the input's autocorrelation",
    "recompute": "every branch's map computed twice, none kept",
}
