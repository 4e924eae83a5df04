"""What a training step of whole networks keeps in memory: plain, ACNet in eager, and the ways to make that smaller.

Each contender runs in a process of its own. `saved_bytes` is what autograd keeps for backward, counted by
`harness.saved_bytes`; `peak_bytes` is the growth of the process's resident memory over a step (CPU) or of the
allocator's (CUDA); torch.compile has none on a CPU, where its first step's peak is the compiler's and a later
one's is hidden by it. `largest_batch` is on CUDA the batch that a step fits the device's memory with, found by
trying; on a CPU the one whose saved bytes fit --budget, from what two batches save. Writes memory-<dtype>.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import harness
from .contenders import COMPILED
from .network import MEASURED, NETWORKS, batch_of, build, loss_of, names_for

LARGEST = 2**16


def resident_bytes() -> int:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def largest_batch(fits: Callable[[int], bool], most: int = LARGEST) -> int:
    """The largest batch that fits, of those up to `most`, if every smaller one fits too; 0 where none does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def batch_within(budget: int, small: tuple[int, int], large: tuple[int, int]) -> int:
    """The batch whose saved bytes fit the budget, from two (batch, saved bytes); they grow by the image."""
    an_image = (large[1] - small[1]) / (large[0] - small[0])
    return max(int((budget - (large[1] - an_image * large[0])) / an_image), 0)


def measure(
    network: str, contender: str, batch: int, dtype: torch.dtype, device: torch.device, budget: int
) -> dict[str, int]:
    """Metric → bytes, or images, of one training step; meant for a process of its own."""
    model = build(network, contender, device)
    known = [*model.parameters(), *model.buffers()]

    def saved(images: int) -> int:
        data = batch_of(NETWORKS[network], images, device)
        return harness.saved_bytes(lambda: loss_of(model, *data, dtype), known)

    def step(images: int) -> None:
        loss_of(model, *batch_of(NETWORKS[network], images, device), dtype).backward()

    def fits(images: int) -> bool:
        try:
            step(images)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    if device.type == "cuda":
        if contender in COMPILED:
            step(batch)  # compiling is not training
        found = {"saved_bytes": saved(batch), "peak_bytes": harness.peak_bytes(lambda: step(batch), device)}
        return {**found, "largest_batch": largest_batch(fits)}
    before = resident_bytes()
    step(batch)  # first, so that no earlier peak hides it
    peak = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 0)
    kept, half = saved(batch), saved(batch // 2)
    largest = batch_within(budget, (batch // 2, half), (batch, kept))
    found = {"saved_bytes": kept, "peak_bytes": peak, "largest_batch": largest}
    if contender in COMPILED:
        del found["peak_bytes"]
    return found


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a fresh process, so that one contender's peak is not another's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, before any process is made
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)


def run(options: argparse.Namespace) -> list[Path]:
    """Measures all networks in all dtypes; returns the files written."""
    written = []
    for dtype in options.dtype:
        report, lines = harness.Report(options.device), []
        for network in (NETWORKS[name] for name in options.networks if name in NETWORKS):
            batch = network.batch(options.device)
            for contender in names_for(network, options, MEASURED):
                arguments = (network.name, contender, batch, dtype, options.device, options.budget)
                found = isolated(measure, *arguments)
                for metric, value in found.items():
                    shape = network.shape(batch)
                    report.add(contender, "step", shape, dtype, "channels_last", metric, float(value))
                peak = found["peak_bytes"] / 2**20 if "peak_bytes" in found else "–"
                saved = found["saved_bytes"] / 2**20
                lines.append((network.shape(batch), contender, saved, peak, found["largest_batch"]))
        name = harness.dtype_name(dtype)
        fitting = "largest batch" if options.device.type == "cuda" else f"batch that saves {options.budget:,} B"
        print(harness.table((f"network, {name}", "contender", "saved MiB", "peak MiB", fitting), lines), flush=True)
        written.append(options.out / f"memory-{name}.csv")
        report.write_csv(written[-1])
    return written
