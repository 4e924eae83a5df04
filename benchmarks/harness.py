"""What every benchmark shares: interleaved timing, one CSV schema, a copy-bandwidth ceiling, memory counts.

A benchmark builds contenders (name → one callable per input set), hands them all to one `measure()` call, and
turns the samples into `Row`s. All contenders of a row group are timed in turn within the same loop, so that
clock changes and neighbours hit them alike. Input sets rotate, so that no contender finds its inputs in cache
when the sets together exceed it (`sets_beyond_cache`).
"""

from __future__ import annotations

import csv
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from acnet_kernels.backends import timer

from .machine import cache_bytes, clock_mhz, environment, machine_class

Calls = Sequence[Callable[[], Any]]  # one contender: the same work on each input set in turn


@dataclass(frozen=True)
class Row:
    """A line of the CSV, a metric of one contender, and the machine and software it was measured on.

    `mode` is what was run (forward, backward, step, out=, …); `metric` names the quantity and its unit
    ("time_ms", "saved_bytes", "copy_fraction"). A quantity without spread has p20 = p50 = p80. `clock` is the
    core's (CUDA: multiprocessors') in MHz just after the samples were taken, empty where it cannot be known.
    """

    contender: str
    mode: str
    shape: str
    dtype: str
    layout: str
    metric: str
    p20: float
    p50: float
    p80: float
    device: str
    torch: str
    triton: str
    cudnn: str
    driver: str
    clock: str
    command: str
    date: str


RUN = ("device", "torch", "triton", "cudnn", "driver", "command", "date")  # of a run: once, not in every line
COLUMNS = tuple(field.name for field in fields(Row) if field.name not in RUN)


@dataclass(frozen=True)
class Samples:
    """What every timed call of one contender took (milliseconds), or its rate; the clock in MHz after them."""

    values: tuple[float, ...]
    clock: str = ""

    def quantile(self, q: float) -> float:
        """The q-quantile, linearly interpolated."""
        return torch.tensor(self.values, dtype=torch.float64).quantile(q).item()

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)

    def rate(self, amount: float) -> Samples:
        """Billions of whatever there is `amount` of in each call, a second."""
        return Samples(tuple(amount / value / 1e6 for value in self.values), self.clock)


class Clock(Protocol):
    """What times a call."""

    def seconds(self) -> float:
        """Of a clock that never goes back."""
        ...

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """How long the call takes, all it started on the device included."""
        ...


class CpuClock:
    """The monotonic clock."""

    def seconds(self) -> float:
        """Since some moment."""
        return time.monotonic()

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Of the call."""
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e6


class CudaClock(CpuClock):
    """The monotonic clock, from an idle device to an idle device: launches are part of the time."""

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Between the call's beginning and the end of what it launched."""

        def complete() -> None:
            call()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return super().milliseconds(complete)


class DeviceClock(CpuClock):
    """CUDA events around work that waits on the device already: no launch is part of the time."""

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Between the first kernel's beginning and the last one's end."""
        return timer.running(call, torch.device("cuda", torch.cuda.current_device()))


def clock_of(device: torch.device | str) -> Clock:
    """What times calls on this device."""
    return CudaClock() if torch.device(device).type == "cuda" else CpuClock()


def measure(
    contenders: Mapping[str, Calls],
    device: torch.device | str = "cpu",
    *,
    warm_up: float = 0.3,
    seconds: float = 2.0,
    least: int = 10,
    weights: Mapping[str, int] | None = None,
    clock: Clock | None = None,
) -> dict[str, Samples]:
    """Times all contenders, round after round, each in a new order, and returns each one's samples.

    In a fixed order a contender would always find the memory and caches that the same other one left.

    Args:
        contenders: name → callables, one per input set; round i uses callable i modulo their number.
        device: timed by a monotonic clock, launches included.
        warm_up: seconds each contender runs first (autotuning, clocks), in one call at the least; 0 is not at all.
        seconds: length of the timed part, all contenders together, in shares: one that has used up its own is left
            out of further rounds, so a slow one takes no time from the others.
        least: calls of each that are timed even if they take longer than its share, unless they take longer than
            all of `seconds`.
        weights: contender → how many times another's share and least number of calls it gets; 1 where not named.
        clock: None is the device's; DeviceClock for what is launched at once, as a graph.
    """
    clock = clock or clock_of(device)
    for calls in contenders.values():
        end, i = clock.seconds() + warm_up, 0
        while clock.seconds() < end:
            clock.milliseconds(calls[i % len(calls)])
            i += 1
    times: dict[str, list[float]] = {name: [] for name in contenders}
    weight = {name: (weights or {}).get(name, 1) for name in contenders}
    share = seconds / max(sum(weight.values()), 1)
    shuffle = random.Random(0).shuffle
    waiting, i = list(times), 0
    while waiting:
        shuffle(waiting)
        for name in waiting:
            calls = contenders[name]
            times[name].append(clock.milliseconds(calls[i % len(calls)]))
        spent = {name: sum(times[name]) / 1e3 for name in waiting}
        waiting = [
            name
            for name in waiting
            if spent[name] < share * weight[name]
            or (len(times[name]) < least * weight[name] and spent[name] < seconds)
        ]
        i += 1
    at = clock_mhz(device)
    return {name: Samples(tuple(values), at) for name, values in times.items()}


def graphed(*calls: Callable[[], Any]) -> Callable[[], None]:
    """The calls' CUDA kernels as one graph: replaying it runs them without launching each from Python.

    Each call runs before the capture, in which no kernel may be loaded and no workspace allotted. Raises what the
    capture raises where a call cannot be captured (it synchronises, or is a graph itself).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture is not on the default stream either
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def sets_beyond_cache(bytes_per_set: int, device: torch.device | str = "cpu", most: int = 64) -> int:
    """How many input sets of this size together exceed the cache (2 at the least, `most` at the most)."""
    return min(max(cache_bytes(device) // max(bytes_per_set, 1) + 1, 2), most)


def copy_calls(nbytes: int, device: torch.device | str = "cpu", sets: int = 2) -> Calls:
    """A contender that copies: nbytes moved (half read, half written) by one Tensor.copy_.

    The ceiling for memory-bound work: time of this over time of a contender that must move as many bytes.
    """
    halves = [torch.rand(2, max(nbytes // 8, 1), device=device) for _ in range(sets)]
    return [lambda pair=pair: pair[1].copy_(pair[0]) for pair in halves]


def saved_bytes(call: Callable[[], Any], but: Iterable[Tensor] = ()) -> int:
    """Bytes that call() keeps for its backward, each storage once, without the storages of `but`.

    Give the parameters in `but`: they exist anyway. The result of call() must be alive when it returns, as
    the loss is in training, so whatever autograd dropped during the forward is not counted twice.
    """
    known = {t.untyped_storage().data_ptr() for t in but}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(kept.values())


def peak_bytes(call: Callable[[], Any], device: torch.device | str) -> int:
    """Most CUDA memory allocated during call(), above what was allocated before it. CUDA only."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def dtype_name(dtype: torch.dtype | str) -> str:
    """'float32' of torch.float32; a name as it is."""
    return str(dtype).removeprefix("torch.")


def results_dir(device: torch.device | str = "cpu") -> Path:
    """Where results of this kind of machine are committed: benchmarks/results/<machine class>."""
    return Path(__file__).parent / "results" / machine_class(device)


class Report:
    """Collects rows of one run and writes them.

    Args:
        device: where the run is; its description goes into every row.
        path: a CSV that every row is appended to when it is added, so that an interrupted run leaves them.
    """

    def __init__(self, device: torch.device | str = "cpu", path: Path | None = None) -> None:
        self.environment = environment(device)
        self.rows: list[Row] = []
        self.path = path
        if path is not None:  # what is there already is of another run
            with path.open("a", newline="") as file:
                if file.tell() == 0:
                    csv.writer(file).writerow(COLUMNS)
                file.write(_run_line(self.environment))

    def add(
        self,
        contender: str,
        mode: str,
        shape: str,
        dtype: torch.dtype | str,
        layout: str,
        metric: str,
        value: Samples | float,
    ) -> None:
        """One row; a float is a quantity without spread."""
        if isinstance(value, Samples):
            p20, p50, p80 = (round(value.quantile(q), 6) for q in (0.2, 0.5, 0.8))
        else:
            p20 = p50 = p80 = value
        what = (contender, mode, shape, dtype_name(dtype), layout, metric, p20, p50, p80)
        clock = value.clock if isinstance(value, Samples) else ""
        row = Row(*what, clock=clock, **self.environment)
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow(getattr(row, name) for name in COLUMNS)

    def write_csv(self, path: Path) -> None:
        """All rows, as `write_csv` writes them."""
        write_csv(self.rows, path)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """A header, then each run's line of metadata (`# {"device": …}`) before its rows."""
    run: dict[str, str] = {}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            if run != (run := {name: getattr(row, name) for name in RUN}):
                file.write(_run_line(run))
            writer.writerow(getattr(row, name) for name in COLUMNS)


def _run_line(run: Mapping[str, str]) -> str:
    return f"# {json.dumps(dict(run), ensure_ascii=False)}\n"


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `write_csv` or a Report wrote; ValueError where its columns are others."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    if tuple(header.split(",")) != COLUMNS:
        raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got {header}")
    rows: list[Row] = []
    run: dict[str, str] = {}
    for line in lines:
        if line.startswith("# {"):
            run = json.loads(line[2:])
            continue
        cells: dict[str, Any] = dict(zip(COLUMNS, next(csv.reader([line])), strict=True))
        rows.append(Row(**run, **cells | {q: float(cells[q]) for q in ("p20", "p50", "p80")}))
    return rows


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table that is also readable as plain text: columns padded, numbers to three digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [list(header), rule, *cells]
    )
