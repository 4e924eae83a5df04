"""Launches of Triton's kernels: a routine's all in one call, from the second time on (csrc/launch.cpp).

A routine is a function of tensors and constants that allocates by `empty`, launches by `launch`, and returns what
it has allocated. Its first run on tensors of a kind launches by Triton, which compiles what is missing, and is
recorded: the compiled kernels' functions, grids and parameters, and of each pointer which tensor it is of. Every
later run on such tensors is one call of an operator, which allocates and launches without Triton:

    replay(routine, stream, tensors) -> results
        What the routine of this number returns for the tensors, launched on a raw stream; [] where it was not
        recorded for such tensors. Any of them may be written, as the routine does.
    remember(routine, tensors, results, workspace, kernels) -> ()
        Has replay launch `kernels` (see _Recording.numbers) for tensors like these: results are allocated like
        `results`, and so many bytes of memory besides that nothing outlives. Kernels belong to the current context.

Of a kind are tensors that agree in dtype, device, shape, strides, alignment to 16 bytes, and in which of them are
at one address. Integers that a kernel takes follow from that and from the constants, so nothing that Triton
specialises on is left out: Triton itself picks each kernel, once. Its knobs are read then, too.

Triton's own launcher runs where WHY_TRITONS says why, while a launch hook is set (profilers set one), and for a
routine with a launch that needs more than a function and parameters. No launch allocates but by torch, or waits:
graphs capture it.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import below_autograd
from . import check
from ._extension import LOADED, TRITON, WHY_MISSING

# Versions whose compiled kernels are understood, tested against their launchers (tests/test_launch.py).
KNOWN = ("3.6", "3.7", "3.8")
_MOST_ROUTINES = 4096
_ALIGNMENT = 256  # of what shares the workspace; Triton asks about 16

Routine = Callable[..., list[Tensor]]


def _why_tritons() -> str:
    if not TRITON:
        return "Triton is not installed"
    if not LOADED:
        return WHY_MISSING
    version = metadata.version("triton")
    if not any(version.startswith(f"{known}.") for known in KNOWN):
        return f"compiled kernels of Triton {version} are not known, only of {', '.join(KNOWN)}"
    return ""


# Why every launch goes by Triton's own launcher; empty where routines are replayed.
WHY_TRITONS = _why_tritons()

if LOADED:
    _LIBRARY = torch.library.Library("acnet_kernels", "FRAGMENT")
    _replay = torch.ops.acnet_kernels.replay.default
    _remember = torch.ops.acnet_kernels.remember.default

    @torch.library.register_fake("acnet_kernels::replay")
    def _(routine: int, stream: int, tensors: list[Tensor]) -> list[Tensor]:
        check.one_device(tensors=tensors)
        return []  # there is no memory to launch on: the routine's own operator says what it returns

    @torch.library.register_fake("acnet_kernels::remember")
    def _(routine: int, tensors: list[Tensor], results: list[Tensor], workspace: int, kernels: list[int]) -> None:
        check.one_device(tensors=tensors, results=results)

    check.refuse_leaves(_LIBRARY, _replay)


class _Local(threading.local):
    recording: _Recording | None = None


_local = _Local()
_routines: dict[tuple[Any, ...], int] = {}  # (routine, its constants) → its number
_numbered = 0
_kernels: set[Any] = set()  # compiled kernels in use: one that is collected is unloaded


class _UnknownLaunchError(Exception):
    """A launch that replay cannot make."""


def known(routine: Routine, constants: tuple[Any, ...], device: int) -> tuple[int, int] | None:
    """(the routine's number, the device's current stream) for replay's operator; None where it is not to run."""
    number = _routines.get((routine, constants))
    if number is None or WHY_TRITONS or _hooked():
        return None
    return number, _triton().runtime.driver.active.get_current_stream(device)


def replay(routine: Routine, tensors: Sequence[Tensor], *constants: Any) -> list[Tensor]:
    """What routine(tensors, *constants) returns, where it was recorded for such tensors; else []."""
    found = known(routine, constants, tensors[0].get_device())
    if found is None:
        return []
    with below_autograd():
        return _replay(*found, tensors)


def run(routine: Routine, tensors: Sequence[Tensor], *constants: Any) -> list[Tensor]:
    """routine(tensors, *constants), replayed where it was recorded, else recorded where it can be."""
    found = replay(routine, tensors, *constants)
    if found:
        return found
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        if WHY_TRITONS or _hooked():
            return routine(tensors, *constants)
        recording = _local.recording = _Recording(tensors)
        try:
            results = routine(tensors, *constants)
        finally:
            _local.recording = None
        with contextlib.suppress(_UnknownLaunchError):
            workspace, kernels = recording.numbers(results)
            _remember(_number(routine, constants), tensors, results, workspace, kernels)
            _kernels.update(recording.kernels)
    return results


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options): all but compile-time constants in `args`, in the kernel's order."""
    compiled = kernel[grid](*args, **options)
    if _local.recording is not None:
        _local.recording.launches.append((compiled, grid, args))


def empty(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """torch.empty, for a routine's results and for what it needs in between."""
    t = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    if _local.recording is not None:
        _local.recording.made.append(t)
    return t


def empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like, likewise."""
    made = torch.empty_like(t, dtype=dtype)
    if _local.recording is not None:
        _local.recording.made.append(made)
    return made


def tail(t: Tensor, start: int) -> Tensor:
    """t[start:] of a vector that `empty` gave, as a kernel's argument."""
    view = t[start:]
    if _local.recording is not None:
        _local.recording.views[id(view)] = (view, t)
    return view


def split(tensors: Sequence[Tensor], counts: Iterable[int]) -> list[list[Tensor]]:
    """A routine's tensors as lists of these lengths."""
    given = iter(tensors)
    return [[next(given) for _ in range(count)] for count in counts]


def _number(routine: Routine, constants: tuple[Any, ...]) -> int:
    global _numbered
    if len(_routines) >= _MOST_ROUTINES:
        _routines.clear()
    _numbered += 1
    return _routines.setdefault((routine, constants), _numbered)


@functools.cache
def _triton() -> Any:
    import triton  # slow to import

    return triton


def _hooked() -> bool:
    """Whether a hook is to be called with every launch."""
    hooks = _triton().knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


class _Recording:
    """One run of a routine."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.made: list[Tensor] = []
        self.views: dict[int, tuple[Tensor, Tensor]] = {}  # of a view, by its id: itself, and what it is of
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []

    @property
    def kernels(self) -> list[Any]:
        """The compiled kernels launched."""
        return [compiled for compiled, *_ in self.launches]

    def numbers(self, results: Sequence[Tensor]) -> tuple[int, list[int]]:
        """(bytes of workspace, the launches) as `remember` takes them.

        Of each launch: function, grid (3), threads, bytes of shared memory, number of parameters, and each of
        these as (memory, offset) for a pointer, memories counted from the tensors on, then the results, then the
        workspace, or as (-1, bits).

        Raises:
            _UnknownLaunchError: replay cannot do as the routine did.
        """
        places = {id(t): (i, 0) for i, t in enumerate([*self.tensors, *results])}
        made = {id(t) for t in self.made}
        if not results or not all(id(t) in made for t in results):
            raise _UnknownLaunchError
        workspace = 0
        for t in self.made:
            if id(t) not in places:
                places[id(t)] = (len(self.tensors) + len(results), workspace)
                workspace += -(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT
        for view, base in self.views.values():
            place, offset = places[id(base)]
            places[id(view)] = (place, offset + view.data_ptr() - base.data_ptr())
        numbers: list[int] = []
        for compiled, grid, args in self.launches:
            numbers += _fixed(compiled, grid)
            parameters = [*_parameters(compiled.src.signature, args, places), -1, 0, -1, 0]  # scratch memory: none
            numbers += [len(parameters) // 2, *parameters]
        return workspace, numbers


def _fixed(compiled: Any, grid: tuple[int, ...]) -> list[int]:
    """Function, grid, threads and bytes of shared memory of a launch."""
    told = getattr(compiled, "metadata", None)
    if told is None:  # Triton's interpreter compiles nothing
        raise _UnknownLaunchError
    attributes = told.num_ctas > 1 or told.launch_pdl or told.launch_cooperative_grid
    scratch = told.global_scratch_size or told.profile_scratch_size
    if attributes or scratch or getattr(told, "instrumentation_mode", ""):
        raise _UnknownLaunchError
    size = (*grid, 1, 1)[:3]
    return [compiled.function, *size, told.num_warps * told.target.warp_size, told.shared]


def _parameters(
    signature: dict[str, Any], args: tuple[Any, ...], places: dict[int, tuple[int, int]]
) -> Iterator[int]:
    """(memory, offset) or (-1, bits) of each parameter of a compiled kernel, two numbers each."""
    types = tuple(signature.values())
    if any(type_ != "constexpr" for type_ in types[len(args) :]):
        raise _UnknownLaunchError
    for type_, arg in _flat(types[: len(args)], args):
        if not type_.startswith("*"):
            yield from (-1, _bits(type_, arg))
        elif id(arg) in places:
            yield from places[id(arg)]
        else:
            raise _UnknownLaunchError


def _flat(types: tuple[Any, ...], args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """(type, argument) of each parameter: tuples are spread, compile-time constants are none."""
    for type_, arg in zip(types, args, strict=True):
        if isinstance(type_, tuple):
            yield from _flat(type_, tuple(arg))
        elif type_ != "constexpr":
            yield type_, arg


_FORMATS = {"i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


def _bits(type_: str, value: Any) -> int:
    """A parameter's bytes, as an int64."""
    if type_ not in _FORMATS:
        raise _UnknownLaunchError
    return int.from_bytes(struct.pack(f"<{_FORMATS[type_]}", value).ljust(8, b"\0"), "little", signed=True)
