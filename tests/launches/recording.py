"""A CUDA driver that keeps every launch with its arguments, as Python sees it."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from acnet_kernels.ops import launch
from benchmarks import stand_in

MOST_ARGUMENTS, MOST_LAUNCHES = 96, 4096
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class _Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_ulonglong) for name in ("function", "stream", "context")),
        *((name, ctypes.c_uint * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint) for name in ("shared", "attributes", "plain", "count")),
        ("arguments", ctypes.c_ulonglong * MOST_ARGUMENTS),
    ]


class Argument(NamedTuple):
    """An argument's bytes as a number, and how many they are."""

    value: int
    size: int


class Launch(NamedTuple):
    """What the driver was given; `plain` says by which of its two functions."""

    name: str
    function: int
    stream: int
    context: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    plain: bool
    arguments: tuple[Argument, ...]


class Driver:
    """Takes the place of libcuda, and the CPU's memory that of the device."""

    def __init__(self) -> None:
        self._library: Any = stand_in.install_kernels("compile", Path(__file__).with_name("recording_driver.c"))
        self._kernels: dict[int, tuple[str, list[int]]] = {}
        triton.knobs.runtime.kernel_load_end_hook.add(self._loaded)

    def _loaded(self, module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        """Learns from a kernel's PTX how large its arguments are."""
        text = Path(next(path for file, path in files.items() if file.endswith(".ptx"))).read_text()
        entry = re.search(r"\.entry\s+\w+\((.*?)\)", text, re.DOTALL)
        assert entry is not None
        sizes = [BYTES[bits] for bits in re.findall(r"\.param \.[a-z](\d+)", entry[1])]
        self._kernels[function] = name, sizes
        self._library.describe(ctypes.c_size_t(function), len(sizes), bytes(sizes))

    def take(self) -> list[Launch]:
        """The launches since the last call, in order."""
        raw = (_Launch * MOST_LAUNCHES)()
        found = []
        for one in raw[: self._library.take(raw)]:
            name, sizes = self._kernels[one.function]
            assert one.count == len(sizes)
            arguments = tuple(map(Argument, one.arguments[: one.count], sizes))
            fixed = (one.shared, one.attributes, bool(one.plain))
            where = (name, one.function, one.stream, one.context, tuple(one.grid), tuple(one.block))
            found.append(Launch(*where, *fixed, arguments))
        return found

    def use_stream(self, stream: int) -> None:
        """This is the current stream from now on."""
        triton.runtime.driver.active.get_current_stream = lambda *_: stream

    def use_context(self, context: int) -> None:
        """This is the calling thread's context from now on; 0 for none."""
        self._library.set_context(ctypes.c_size_t(context))

    def context(self) -> int:
        """The calling thread's context."""
        self._library.get_context.restype = ctypes.c_size_t
        return self._library.get_context()


class Run(NamedTuple):
    """A routine's launches, and the memory it worked on: (address, bytes) of what it was given and what it made."""

    launches: list[Launch]
    given: list[tuple[int, int]]
    results: list[tuple[int, int]]
    between: list[tuple[int, int]]  # what it made and did not return; of replayed ones this is not known


def extent(t: Tensor) -> tuple[int, int]:
    """(address, bytes) of a dense tensor."""
    return t.data_ptr(), t.numel() * t.element_size()


def run(driver: Driver, routine: Callable[..., Any], tensors: Sequence[Tensor], *constants: Any) -> Run:
    """One run of a routine, by whatever launcher runs it; its results live until the launches are read."""
    made: list[Tensor] = []
    empty = torch.empty

    def kept(*args: Any, **kwargs: Any) -> Tensor:
        made.append(empty(*args, **kwargs))
        return made[-1]

    like = torch.empty_like

    def kept_like(*args: Any, **kwargs: Any) -> Tensor:
        made.append(like(*args, **kwargs))
        return made[-1]

    driver.take()
    torch.empty, torch.empty_like = kept, kept_like
    try:
        results = launch.run(routine, tensors, *constants)
    finally:
        torch.empty, torch.empty_like = empty, like
    between = [extent(t) for t in made if not any(t is r for r in results)]
    return Run(driver.take(), [extent(t) for t in tensors], [extent(t) for t in results], between)


def assert_same(tritons: Run, ours: Run) -> None:
    """Launch by launch and argument by argument the same, pointers by what they point to.

    What a routine makes lies elsewhere in every run: in ours the results are known, and the rest must be pieces of
    memory that share none with anything, aligned alike.
    """
    assert [one.name for one in ours.launches] == [one.name for one in tritons.launches]
    assert all(one.plain for one in ours.launches)
    assert not any(one.plain for one in tritons.launches)
    between: dict[int, int] = {}  # which piece of Triton's run → its address in ours
    for theirs, own in zip(tritons.launches, ours.launches, strict=True):
        for field in ("function", "stream", "context", "grid", "block", "shared", "attributes"):
            assert getattr(own, field) == getattr(theirs, field), (own.name, field)
        for i, (their, our) in enumerate(zip(theirs.arguments, own.arguments, strict=True)):
            where = f"argument {i} of {own.name}"
            assert our.size == their.size, where
            kind, piece, offset = place(tritons, their.value) if their.size == 8 else ("number", 0, their.value)
            if kind == "number":
                assert our.value == their.value, where
            elif kind == "between":
                assert between.setdefault(piece, our.value - offset) == our.value - offset, where
            else:
                assert our.value == getattr(ours, kind)[piece][0] + offset, where
                assert our.value % 16 == their.value % 16, where
    pieces = [(address, tritons.between[piece][1]) for piece, address in between.items()]
    assert all(address % 16 == 0 for address, _ in pieces)
    spans = sorted([*pieces, *((address, size) for address, size in (*ours.results, *set(ours.given)) if size)])
    written = {address for address, _ in (*pieces, *ours.results)}
    for (address, size), (following, _) in itertools.pairwise(spans):
        assert address + size <= following or not {address, following} & written


def place(run: Run, address: int) -> tuple[str, int, int]:
    """(list of the run's, index in it, offset) of what an address is in; ("number", 0, address) of none."""
    for kind in ("given", "results", "between"):
        for i, (start, size) in enumerate(getattr(run, kind)):
            if start <= address < start + size:
                return kind, i, address - start
    return "number", 0, address
