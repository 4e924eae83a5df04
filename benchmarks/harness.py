"""What every benchmark shares: interleaved timing, one CSV schema, a copy-bandwidth ceiling, memory counts.

A benchmark builds contenders (name → one callable per input set), hands them all to one `measure()` call, and
turns the samples into `Row`s. All contenders of a row group are timed in turn within the same loop, so that
clock changes and neighbours hit them alike. Input sets rotate, so that no contender finds its inputs in cache
when the sets together exceed it (`sets_beyond_cache`).
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Calls = Sequence[Callable[[], Any]]  # one contender: the same work on each input set in turn

# Family 6 models whose /proc/cpuinfo name says no more than "Xeon Processor" under virtualisation.
INTEL_MODELS = {
    85: "cascade-lake",
    106: "ice-lake",
    143: "sapphire-rapids",
    173: "granite-rapids",
    207: "emerald-rapids",
}


@dataclass(frozen=True)
class Row:
    """One line of the CSV: a metric of one contender, with the machine and software it was measured on.

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


@dataclass(frozen=True)
class Samples:
    """Milliseconds of every timed call of one contender."""

    milliseconds: tuple[float, ...]
    clock: str = ""

    def quantile(self, q: float) -> float:
        """The q-quantile, linearly interpolated."""
        return torch.tensor(self.milliseconds, dtype=torch.float64).quantile(q).item()

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)


def measure(
    contenders: Mapping[str, Calls],
    device: torch.device | str = "cpu",
    *,
    warm_up: float = 0.3,
    seconds: float = 2.0,
    least: int = 10,
) -> dict[str, Samples]:
    """Times all contenders in turn, round after round, and returns each one's samples.

    Args:
        contenders: name → callables, one per input set; round i uses callable i modulo their number.
        device: 'cpu' is timed by a monotonic clock, a CUDA device by events on its current stream.
        warm_up: seconds each contender runs first (compilation, autotuning, clocks).
        seconds: length of the timed part, all contenders together.
        least: rounds timed even if they take longer than that.
    """
    device = torch.device(device)
    clock = _time_cuda if device.type == "cuda" else _time_cpu
    for calls in contenders.values():
        end, i = time.monotonic() + warm_up, 0
        while i < len(calls) or time.monotonic() < end:  # every input set once, at the least
            calls[i % len(calls)]()
            i += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    names, times = list(contenders), {name: [] for name in contenders}
    end, i = time.monotonic() + seconds, 0
    while i < least or time.monotonic() < end:
        first = i % len(names)  # whoever follows a slow contender changes from round to round
        for name in names[first:] + names[:first]:
            calls = contenders[name]
            times[name].append(clock(calls[i % len(calls)]))
        i += 1
    at = clock_mhz(device)
    return {name: Samples(tuple(values), at) for name, values in times.items()}


def _time_cpu(call: Callable[[], Any]) -> float:
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6


def _time_cuda(call: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def cache_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes of the last cache before memory: L2 of a GPU, the largest cache of CPU 0."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 * 2**20)


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


def cpu_name() -> str:
    """The processor's name, with its code name where the model number gives it away."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    entry = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.split("\n\n")[0], re.MULTILINE))
    name = re.sub(r"\((R|TM)\)", "", entry.get("model name", platform.machine()))
    if entry.get("vendor_id") == "GenuineIntel" and entry.get("cpu family") == "6":
        code = INTEL_MODELS.get(int(entry["model"]))
        return f"{name} ({code})" if code else name
    return name


def device_name(device: torch.device | str = "cpu") -> str:
    """'NVIDIA H100 …', or the processor with the threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def machine_class(device: torch.device | str = "cpu") -> str:
    """The directory name under benchmarks/results for this kind of machine: 'xeon-emerald-rapids-2core'."""
    device = torch.device(device)
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return _slug(re.sub(r"\b(Intel|AMD|Processor|CPU)\b|@.*", "", cpu_name())) + f"-{os.cpu_count()}core"


def _slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def results_dir(device: torch.device | str = "cpu") -> Path:
    """benchmarks/results/<machine class>, made if absent."""
    path = Path(__file__).parent / "results" / machine_class(device)
    path.mkdir(parents=True, exist_ok=True)
    return path


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """The Row fields that say where and with what a run was made."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    device = torch.device(device)
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name}" if module else os.path.relpath(sys.argv[0])
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
        "driver": _ask_nvidia("driver_version", device) if device.type == "cuda" else "",
        "command": f"python {program} {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
    }


def clock_mhz(device: torch.device | str = "cpu") -> str:
    """The clock now, in MHz: the fastest core's, or a GPU's multiprocessors'; '' where it cannot be known."""
    device = torch.device(device)
    if device.type == "cuda":
        return _ask_nvidia("clocks.sm", device).split()[0]
    try:
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return f"{max(map(float, found)):.0f}" if found else ""


def _ask_nvidia(field: str, device: torch.device) -> str:
    uuid = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", uuid, f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Report:
    """Collects rows of one run and writes them.

    Args:
        device: where the run is; its description goes into every row.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.environment = environment(device)
        self.rows: list[Row] = []

    def add(
        self,
        contender: str,
        mode: str,
        shape: str,
        dtype: torch.dtype,
        layout: str,
        metric: str,
        value: Samples | float,
    ) -> None:
        """One row; a float is a quantity without spread."""
        if isinstance(value, Samples):
            p20, p50, p80 = (round(value.quantile(q), 6) for q in (0.2, 0.5, 0.8))
        else:
            p20 = p50 = p80 = value
        what = (contender, mode, shape, str(dtype).removeprefix("torch."), layout, metric, p20, p50, p80)
        clock = value.clock if isinstance(value, Samples) else ""
        self.rows.append(Row(*what, clock=clock, **self.environment))

    def write_csv(self, path: Path) -> None:
        """All rows, one header line."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([getattr(row, name) for name in COLUMNS] for row in self.rows)


COLUMNS = tuple(field.name for field in fields(Row))


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `Report.write_csv` wrote; ValueError where its columns are others."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return [Row(**{**line, **{q: float(line[q]) for q in ("p20", "p50", "p80")}}) for line in reader]


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table that is also readable as plain text: columns padded, numbers to three digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [list(header), rule, *cells]
    )
