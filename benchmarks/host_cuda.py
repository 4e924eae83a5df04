"""Host time of a step on the CUDA paths, without a device: kernels are launched into a driver that does nothing.

Maps are so small that what the CPU computes, convolutions and plain modules, takes no time beside the calls. So
these are microseconds of PyTorch, Python and the launcher, beside those of plain modules on the CPU. What the
library's convolutions cost the host on CUDA is not among them, nor what a driver takes for a launch; no device has
confirmed any of it. Beside each: how many kernels a step launches, and operators the dispatcher calls for it: by a
hook and a mode, under which Python's node runs.

    python -m benchmarks.host_cuda [--seconds 4] [--csv FILE]

`rows` does the same in a process of its own, as everything here takes the CPU for a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acnet_kernels import ACBlock
from acnet_kernels._torch_compat import TorchDispatchMode
from acnet_kernels.backends import branches
from acnet_kernels.ops import launch
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, Phases

from . import harness

C, SHAPE = 4, (1, 4, 2, 2)
STEPS = 20  # in one timed call
TRITONS = "Triton's launcher"
FORWARD, STEP = "forward", "step"  # without gradients; forward and backward


def rows(seconds: float = 4.0) -> list[harness.Row]:
    """The rows of one run, timed for so many seconds a dtype: metrics "host_us", "launches" and "operators"."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "host_cuda.csv"
        command = [sys.executable, "-m", "benchmarks.host_cuda", "--seconds", str(seconds), "--csv", str(path)]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.DEVNULL)
        return harness.read_csv(path)


def main(argv: list[str] | None = None) -> int:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="timed part of a dtype (%(default)s)")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    from . import stand_in

    torch.set_num_threads(1)
    stand_in.install_kernels("compile")
    report = harness.Report("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        _measure(report, dtype, options.seconds)
    if options.csv:
        report.write_csv(options.csv)
    print(table(report.rows))
    return 0


class Modules(nn.Module):
    """Branches as modules: a convolution and a batch norm each, and their sum."""

    def __init__(self, *kernels: tuple[int, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, C, k, padding=(k[0] // 2, k[1] // 2), bias=False), nn.BatchNorm2d(C))
            for k in kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return out


class Contender:
    """A module whose `branches` runs under an assignment of its phases, launching by Triton's launcher or ours."""

    def __init__(self, module: nn.Module, assigned: Phases | None = None, why_tritons: str = "") -> None:
        self.module = module.to(memory_format=torch.channels_last)
        self.x, self.grad = (torch.randn(SHAPE).contiguous(memory_format=torch.channels_last) for _ in range(2))
        self.x.requires_grad_()
        self.parameters = [self.x, *module.parameters()]
        self.assigned, self.why_tritons = assigned, why_tritons

    def call(self, mode: str, steps: int, autocast: bool) -> None:
        """So many steps, or forwards without gradients."""
        branches.phases_of = lambda step, x: self.assigned  # type: ignore[assignment, return-value]
        launch.WHY_TRITONS = self.why_tritons
        context = torch.no_grad() if mode == FORWARD else contextlib.nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), context:
            for _ in range(steps):
                out = self.module(self.x)
                if mode == STEP:
                    out.backward(self.grad.to(out.dtype))
                    for t in self.parameters:
                        t.grad = None


def _contenders() -> dict[str, Contender]:
    def block() -> nn.Module:
        return ACBlock(C, C, 3, padding=1, backend="branches")

    library = "branches, library convolutions"
    return {
        "plain modules": Contender(Modules((3, 3), (1, 3), (3, 1))),
        "conv+bn": Contender(Modules((3, 3))),
        "branches, all Triton": Contender(block(), ALL_TRITON),
        f"branches, all Triton, {TRITONS}": Contender(block(), ALL_TRITON, TRITONS),
        library: Contender(block(), ALL_LIBRARY),
        f"{library}, {TRITONS}": Contender(block(), ALL_LIBRARY, TRITONS),
    }


def _measure(report: harness.Report, dtype: torch.dtype, seconds: float) -> None:
    autocast = dtype != torch.float32
    shape = "x".join(map(str, SHAPE))
    contenders = _contenders()
    for mode in (FORWARD, STEP):
        calls: dict[str, harness.Calls] = {}
        for name, contender in contenders.items():

            def call(contender: Contender = contender, mode: str = mode) -> None:
                contender.call(mode, STEPS, autocast)

            calls[name] = [call]
        for name, samples in harness.measure(calls, seconds=seconds / 2, warm_up=0.5).items():
            where = (name, mode, shape, dtype, "channels_last")
            each = harness.Samples(tuple(1e3 * value / STEPS for value in samples.values), samples.clock)
            report.add(*where, "host_us", each)
            launches, operators = _counts(lambda c=contenders[name], mode=mode: c.call(mode, 1, autocast))
            report.add(*where, "launches", float(launches))
            report.add(*where, "operators", float(operators))


def _counts(call: Callable[[], None]) -> tuple[int, int]:
    """(kernels that a call launches, operators that the dispatcher calls for it)."""
    import triton

    launched: list[Any] = []
    hooks = triton.knobs.runtime.launch_enter_hook  # with a hook, Triton's launcher launches everything
    hooks.add(launched.append)
    try:
        call()
    finally:
        hooks.remove(launched.append)
    with _Counting() as operators:
        call()
    return len(launched), operators.count


class _Counting(TorchDispatchMode):  # type: ignore[misc, valid-type]
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operator(*args, **(kwargs or {}))


def table(found: list[harness.Row]) -> str:
    """The rows as lines of text."""
    values = {(row.contender, row.mode, row.dtype, row.metric): row.p50 for row in found}

    def lines() -> Iterator[list[Any]]:
        for (name, mode, dtype, metric), time in values.items():
            if metric == "host_us":
                plain = values["plain modules", mode, dtype, metric]
                counts = (int(values[name, mode, dtype, what]) for what in ("launches", "operators"))
                yield [name, mode, dtype, round(time), f"{time / plain:.2f}", *counts]

    return harness.table(["contender", "mode", "dtype", "µs", "/ plain modules", "launches", "operators"], lines())


if __name__ == "__main__":
    sys.exit(main())
