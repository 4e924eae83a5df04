"""One training step of one block, shape by shape: every contender interleaved on the same inputs.

'forward' builds the graph, 'step' runs backward too; backward alone is their difference. Half precision is autocast
with float32 parameters and an input of that type, as a layer before gives it. Writes block-<dtype>.csv, with time,
useful rates (the taps of the three kernels counted, and five maps moved a step: x twice, out, its gradient and dx)
and bytes saved for backward, and phases-<dtype>.csv, with what each backend's step is made of beside the ceilings.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from . import ceilings, contenders, harness, phases, shapes
from .contenders import Contender
from .shapes import Shape

# A C++ compilation takes seconds: on a CPU, unless they are asked for, compiled peers run on these shapes alone.
COMPILED_SHAPES = (
    *(shape.name for shape in shapes.TARGETS),
    *("resnet56 stage 2", "resnet18 stage 2", "vgg stage 2"),
)

# The planner's choice against what one would run without us: a few percent are to be told apart there.
WEIGHTS = {"eager": 4, "compile": 4, "auto": 4}

LEAST_SHARE = 0.01  # of a step, for a phase to be written


def run(options: argparse.Namespace) -> list[Path]:
    """Measures all shapes in all dtypes; returns the files written."""
    written = []
    for dtype in options.dtype:
        report, made_of = harness.Report(options.device), harness.Report(options.device)
        ceilings.measure(made_of, dtype, options.device, options.seconds)
        for number, shape in enumerate(options.shapes, 1):
            built = build(shape, dtype, options)
            line = measure(shape, dtype, options, built, report)
            print(
                f"{number}/{len(options.shapes)} {shape} ({shape.name}) {harness.dtype_name(dtype)}: {line}",
                flush=True,
            )
            take_apart(shape, dtype, options, built, made_of)
        for name, rows in (("block", report), ("phases", made_of)):
            written.append(options.out / f"{name}-{harness.dtype_name(dtype)}.csv")
            rows.write_csv(written[-1])
    return written


def names_for(shape: Shape, options: argparse.Namespace) -> list[str]:
    """The contenders of a shape: those asked for, or all but compilations that take too long."""
    if options.contenders:
        return list(options.contenders)
    found = list(contenders.names(options.device))
    slow = options.device.type == "cpu" and (options.quick or shape.name not in COMPILED_SHAPES)
    return [name for name in found if not (slow and name in contenders.COMPILED)]


def build(shape: Shape, dtype: torch.dtype, options: argparse.Namespace) -> list[Contender]:
    """The shape's contenders on as many input sets as exceed the cache together; compiled ones compiled."""
    nbytes = sum(t.nbytes for t in shape.tensors(dtype, "meta"))
    sets = harness.sets_beyond_cache(nbytes, options.device)
    built = contenders.build(shape, dtype, options.device, sets, names_for(shape, options))
    for contender in built:
        if contender.name in contenders.COMPILED:
            contender.step()
    return built


def measure(
    shape: Shape,
    dtype: torch.dtype,
    options: argparse.Namespace,
    built: list[Contender],
    report: harness.Report,
) -> str:
    """Times one shape and adds its rows; returns its line of the log."""
    moved = sum(count * t.nbytes for count, t in zip((3, 2), shape.tensors(dtype, "meta"), strict=True))
    steps = {}
    for mode, share in (("step", 0.75), ("forward", 0.25)):
        samples = harness.measure(
            {c.label: c.calls(mode) for c in built},
            options.device,
            warm_up=0.02 * options.seconds if mode == "step" else 0,  # a step warms up its forward, too
            seconds=share * options.seconds,
            least=options.least,
            weights={c.label: WEIGHTS.get(c.name, 1) for c in built},
        )
        for c in built:
            found = samples[c.label]
            add = _adder(report, c, mode, shape, dtype)
            add("time_ms", found)
            if mode == "step":
                steps[c.label] = found.p50
                add("useful_gflop_per_s", found.rate(3 * shape.useful_flops))
                add("useful_gb_per_s", found.rate(moved))
    for c in built:
        if c.name not in contenders.COMPILED:
            kept = harness.saved_bytes(c.forward, but=c.module.parameters())
            _adder(report, c, "forward", shape, dtype)("saved_bytes", float(kept))
    if options.device.type == "cuda":
        measure_on_cuda(shape, dtype, options, built, report)
    return ", ".join(f"{label} {time:.2f}" for label, time in steps.items())


def _adder(
    report: harness.Report, contender: Contender, mode: str, shape: Shape, dtype: torch.dtype
) -> Callable[[str, harness.Samples | float], None]:
    """What adds a row of this contender, given metric and value."""
    return functools.partial(report.add, contender.name, mode, str(shape), dtype, contender.layout)


def measure_on_cuda(
    shape: Shape, dtype: torch.dtype, options: argparse.Namespace, built: list[Contender], report: harness.Report
) -> None:
    """Adds the step's peak memory, and its time as one CUDA graph, without a launch from Python.

    reduce-overhead is a CUDA graph already; what else cannot be captured is said and left out.
    """
    graphs = {}
    for c in built:
        _adder(report, c, "step", shape, dtype)("peak_bytes", float(harness.peak_bytes(c.step, options.device)))
        if c.name == "reduce-overhead":
            continue
        try:
            graphs[c.label] = [harness.graphed(call) for call in c.calls("step")[:8]]
        except RuntimeError as error:
            print(f"{c.label} on {shape} is no CUDA graph: {str(error).splitlines()[0]}", flush=True)
    timing = {"seconds": options.seconds, "least": options.least, "clock": harness.DeviceClock()}
    samples = harness.measure(graphs, options.device, warm_up=0.02, **timing)
    for c in built:
        if c.label in samples:
            _adder(report, c, "step", shape, dtype)("graph_ms", samples[c.label])


def take_apart(
    shape: Shape,
    dtype: torch.dtype,
    options: argparse.Namespace,
    built: list[Contender],
    report: harness.Report,
) -> None:
    """Adds the phases of a step of eager and of each of our backends, in channels_last; `auto` has its choice's."""
    clock = harness.clock_of(options.device)
    found = {}
    for c in [c for c in built if c.layout == "channels_last" and c.name in ("eager", *contenders.ours())]:
        backend = contenders.backend_of(c)
        if backend not in found:
            found[backend] = phases.record(c.step, clock)
        total = sum(phase.milliseconds for phase in found[backend].values())
        for name, phase in found[backend].items():
            if phase.milliseconds < LEAST_SHARE * total:
                continue
            add = _adder(report, c, name, shape, dtype)
            add("time_ms", phase.milliseconds)
            add("gflop", phase.flops / 1e9)
            add("gbyte", phase.nbytes / 1e9)
