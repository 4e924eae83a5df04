"""Times backends against each other on scratch tensors of a problem's shapes, dtypes and layout."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._torch_compat import cuda_sleep
from ..spec import Branch, Norm, Problem, Step


class Contender(Protocol):
    """What can be timed: a backend, or one of the ways in which a backend can run."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a module's constant
        """What its time is filed under."""

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """One step."""


WARM_UP = 2  # rounds
ROUNDS, MOST_ROUNDS, SECONDS = 7, 50, 0.3  # timed: so many at the least and at the most, for so long in between


def measure(problem: Problem, backends: Sequence[Contender], autocast: bool) -> dict[str, float]:
    """Backend name → median milliseconds of a step (the forward alone where nothing needs a gradient).

    The backends run in turn, round after round, on random tensors of their own: no parameter, statistic, gradient
    or random state of anyone's is read or changed. One that has not the memory is left out.

    Args:
        problem: what to compute; on CUDA on the current device.
        backends: those to time; none may decline the problem.
        autocast: whether problem.dtype comes from autocast over float32 parameters.
    """
    device = torch.device(problem.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        scratch = Scratch(problem, autocast, device)
    except torch.OutOfMemoryError:
        return {}
    samples: dict[str, list[float]] = {backend.NAME: [] for backend in backends}
    rounds, spent = -WARM_UP, 0.0
    while samples and (rounds < ROUNDS or (rounds < MOST_ROUNDS and spent < 1e3 * SECONDS)):
        for backend in backends:
            if backend.NAME not in samples:
                continue
            try:
                taken = milliseconds(functools.partial(scratch.run, backend), device)
            except torch.OutOfMemoryError:
                del samples[backend.NAME]
                continue
            if rounds >= 0:
                samples[backend.NAME].append(taken)
                spent += taken
        rounds += 1
    return {name: statistics.median(taken) for name, taken in samples.items()}


def measure_apart(problem: Problem, backends: Sequence[Contender], autocast: bool) -> dict[str, float]:
    """measure() in the middle of someone's step: in a thread, which sees none of the caller's modes.

    A saved-tensor hook (checkpoint, offloading) or a dispatch mode would take the scratch tensors for the model's.
    Not for the CPU's times: memory that a new thread allocates is fresh, and its OpenMP threads are, too.
    """
    index = torch.cuda.current_device() if problem.device == "cuda" else None

    def run() -> dict[str, float]:
        if index is not None:
            torch.cuda.set_device(index)
        return measure(problem, backends, autocast)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


QUEUE = 4_000_000  # cycles, two milliseconds or so, that a CUDA device waits while launches queue up


class Taken(NamedTuple):
    """A call's milliseconds: until all is launched, and from its first kernel's begin to its last's end."""

    launching: float
    running: float


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes in a stream of them, in which the device runs what the host has launched: the longer."""
    return max(taken(call, device))


def taken(call: Callable[[], object], device: torch.device) -> Taken:
    """Both times of a call, which on CUDA is made twice; elsewhere launching is running."""
    if device.type != "cuda":
        spent = _host_milliseconds(call)
        return Taken(spent, spent)
    torch.cuda.synchronize(device)
    launching = _host_milliseconds(call)
    return Taken(launching, running(call, device))


def running(call: Callable[[], object], device: torch.device) -> float:
    """A CUDA device's time for what the call launches, without the gaps that launching leaves on an idle device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    cuda_sleep(QUEUE)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _host_milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


class Scratch:
    """A step of random tensors that answers to a problem's description."""

    def __init__(self, problem: Problem, autocast: bool, device: torch.device) -> None:
        self.problem, self.autocast, self.device = problem, autocast, device
        dtype = torch.float32 if autocast else problem.dtype
        generator = torch.Generator(device).manual_seed(0)  # not the caller's random state
        layout = torch.channels_last if problem.channels_last else torch.contiguous_format
        filters, geometry = problem.out_channels, problem.geometry
        self.leaves: list[Tensor] = []

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device).to(dtype)
            tensor = tensor.to(memory_format=layout) if tensor.dim() == 4 else tensor
            self.leaves.append(tensor.requires_grad_(problem.grad))
            return tensor

        def norm() -> Norm:
            mean, var = torch.zeros(2, filters, dtype=dtype, device=device).unbind()
            counter = torch.zeros((), dtype=torch.long, device=device)
            return Norm(leaf(filters), leaf(filters), mean, var, counter, 1e-5, 0.1, True)

        self.x = leaf(*problem.shape, dtype=problem.input_dtype)
        branches = []
        for taps, convolved, normed in zip(problem.branches, problem.convolved, problem.normed, strict=True):
            cg = problem.shape[1] // geometry.groups
            weight = leaf(filters, cg, taps.rows, taps.columns) if convolved else None
            branches.append(Branch(taps, weight, None, norm() if normed else None))
        self.step = Step(geometry, tuple(branches), norm() if problem.total else None)
        shape = (problem.shape[0], filters, *problem.output_size)
        grad = torch.randn(shape, generator=generator, device=device).to(problem.dtype)
        self.grad = grad.to(memory_format=layout)

    def run(self, backend: Contender) -> None:
        """One step."""
        with (
            torch.set_grad_enabled(self.problem.grad),
            torch.autocast(self.device.type, self.problem.dtype, enabled=self.autocast),
        ):
            x, step = self.step.padded(self.x)
            out = backend.forward(x, step)
        if self.problem.grad:
            torch.autograd.grad(out, self.leaves, self.grad)
