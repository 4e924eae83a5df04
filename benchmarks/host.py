"""What a step costs the host: microseconds of processor time on tensors so small that the work is nothing.

Plain modules (a convolution and a batch norm a branch, and their sum), a plain convolution with a batch norm, and
every backend, interleaved in one run, one thread; of dense blocks and depthwise ones, in both layouts, with
autocast and without, with gradients and without. Beside each the operators that the dispatcher was called for.
Writes host.csv. Then the CUDA paths without a device (host_cuda.py).

The best of many repetitions counts: whatever else the machine does only adds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from acnet_kernels import ACBlock
from acnet_kernels.backends import planner
from acnet_kernels.ops._extension import TRITON

from . import host_cuda
from .contenders import LAYOUTS, Modules
from .machine import environment

SHAPE, CHANNELS = (1, 4, 2, 2), 4
CALLS, REPETITIONS, QUICK_REPETITIONS = 100, 12, 4
WHATS = ("forward + backward", "forward", "forward, no_grad", "eval, no_grad")
PLAIN = "modules"
COLUMNS = ("block", "what", "layout", "autocast", "contender", "microseconds", "ratio", "operators")


GROUPS = {"dense": 1, "depthwise": CHANNELS}


def contenders(groups: int) -> dict[str, nn.Module]:
    """Name → module, the plain ones first."""
    options = {"padding": 1, "groups": groups}
    found: dict[str, nn.Module] = {PLAIN: Modules(ACBlock(CHANNELS, CHANNELS, 3, **options))}
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False, **options)
    found["conv+bn"] = nn.Sequential(conv, nn.BatchNorm2d(CHANNELS))
    names = ("auto", *(name for name in planner.BACKENDS if name != "folded"))
    return found | {name: ACBlock(CHANNELS, CHANNELS, 3, backend=name, **options) for name in names}


def call(module: nn.Module, what: str, layout: torch.memory_format, autocast: bool) -> Callable[[], None]:
    """One step of this kind."""
    module = copy.deepcopy(module).to(memory_format=layout).train(not what.startswith("eval"))
    backward, without = what.endswith("backward"), what.endswith("no_grad")
    x = torch.randn(SHAPE).to(memory_format=layout).requires_grad_(not without)
    parameters = [x, *module.parameters()]
    grad = torch.randn(SHAPE, dtype=torch.bfloat16 if autocast else None).to(memory_format=layout)

    def step() -> None:
        with contextlib.ExitStack() as stack:
            if autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if without:
                stack.enter_context(torch.no_grad())
            out: Tensor = module(x)
        if backward:
            out.backward(grad)
            for p in parameters:
                p.grad = None

    return step


def operators(step: Callable[[], None]) -> int:
    """How many operators the dispatcher is called for, those within others included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum("::" in event.name and "autograd::" not in event.name for event in profile.events())


def measure(steps: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Name → microseconds of processor time a call, interleaved."""
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        for _ in range(CALLS // 4):
            step()
    for _ in range(repetitions):
        for name, step in steps.items():
            began = time.process_time()
            for _ in range(CALLS):
                step()
            best[name] = min(best[name], (time.process_time() - began) / CALLS * 1e6)
    return best


def rows(repetitions: int) -> Iterator[dict[str, object]]:
    """A row for each contender of each kind of step."""
    for block, autocast, layout, what in itertools.product(GROUPS, (False, True), LAYOUTS, WHATS):
        modules = contenders(GROUPS[block])
        steps = {name: call(module, what, LAYOUTS[layout], autocast) for name, module in modules.items()}
        times = measure(steps, repetitions)
        for name, microseconds in times.items():
            yield {
                "block": block,
                "what": what,
                "layout": layout,
                "autocast": autocast,
                "contender": name,
                "microseconds": round(microseconds, 1),
                "ratio": round(microseconds / times[PLAIN], 3),
                "operators": operators(steps[name]),
            }


def run(options: argparse.Namespace) -> list[Path]:
    """Measures, prints a line a kind of step, and writes host.csv."""
    threads, path = torch.get_num_threads(), options.out / "host.csv"
    torch.set_num_threads(1)
    try:
        found = list(rows(QUICK_REPETITIONS if options.quick else REPETITIONS))
    finally:
        torch.set_num_threads(threads)
    about = {name: value for name, value in environment(torch.device("cpu")).items() if name != "threads"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *about))
        writer.writeheader()
        writer.writerows({**row, **about} for row in found)
    names = COLUMNS[:4]
    for kind in dict.fromkeys(tuple(row[name] for name in names) for row in found):
        cells = [row for row in found if tuple(row[name] for name in names) == kind]
        what = f"{kind[0]}: {kind[1]}, {kind[2]}{', autocast' if kind[3] else ''}"
        times = ", ".join(f"{row['contender']} {row['microseconds']:.0f} µs ({row['ratio']:.2f})" for row in cells)
        print(f"{what}: {times}", flush=True)
    if TRITON:
        print(host_cuda.table(host_cuda.rows(0.5 if options.quick else 4.0)))
    else:
        print("the CUDA paths need Triton, which is not installed")
    return [path]
