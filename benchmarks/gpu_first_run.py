"""Runs the GPU suite's parts in order, each a process with a limit of its own, and reports on what was measured.

What matters most comes first, and a part that hangs or crashes takes no time from another. Beside gpu_suite.csv, to
which the parts append, there is their output, gpu_first_run.log, and in the end gpu_suite.md. With
runs/gpu-cache.tgz, made by `make gpu-cache`, nothing needs to be compiled: it is unpacked to CACHE, the path that
its files hold. Where it does not serve, all processors compile first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CACHE = "/tmp/acnet-kernels-triton"  # TRITON_CACHE_DIR here and where the archive was made
ARCHIVE = ROOT / "runs/gpu-cache.tgz"
MARGIN = 4  # seconds between a part's last measurement and its end


class Part(NamedTuple):
    """A process: its limit in seconds, None for all that is left, and the interpreter's arguments."""

    name: str
    seconds: int | None
    arguments: tuple[str, ...]


def _suite(name: str, *options: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.gpu_suite", name, *options)


def _tests(*paths: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-p", "benchmarks.outcomes", "-n", str(min(12, os.cpu_count() or 1)), "--tb=no", *paths)


WARM = Part("warm", 90, _suite("warm", "--processes", str(os.cpu_count())))
PARTS = (
    Part("first", 30, _suite("first")),
    Part("tests/triton", 90, _tests("tests/triton")),
    Part("phases", 120, _suite("phases")),
    Part("blocks", 90, _suite("blocks")),
    Part("depthwise", 30, _suite("depthwise")),
    Part("networks", 60, _suite("networks")),
    Part("fold", 15, _suite("fold")),
    Part("tests/gpu", 60, _tests("tests/gpu", "tests/test_fusion.py")),
    Part("configurations", None, _suite("configurations")),
)


def run(part: Part, seconds: float, out: Path, more: tuple[str, ...] = ()) -> int:
    """The part's exit status after `seconds` at the most, -9 where it took them all; its output goes to the log."""
    command = [sys.executable, *part.arguments]
    if "benchmarks.gpu_suite" in command:
        command += ["--out", str(out), "--until", str(time.time() + seconds - MARGIN), *more]
    environment = {"TRITON_CACHE_DIR": CACHE, "PYTHONUNBUFFERED": "1", **os.environ, "GPU_SUITE_OUT": str(out)}
    if "pytest" in command:
        environment["OMP_NUM_THREADS"] = "1"
    with (out / "gpu_first_run.log").open("a") as log:
        print(f"\n== {part.name}, {seconds:.0f} s: {' '.join(command)}", file=log, flush=True)
        # A group of its own, so that its workers end with it, but no session: that would outlive a killed run.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            return process.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def compiled(out: Path) -> bool:
    """Whether most kernels of the part `first` were in Triton's cache, by its rows."""
    from . import harness
    from .gpu_suite import CSV

    rows = harness.read_csv(out / CSV) if (out / CSV).exists() else []
    found = {row.metric: row.p50 for row in rows if row.contender == "triton cache"}
    return found.get("hits", 0) > found.get("misses", 0)


def main(argv: list[str] | None = None) -> int:
    """Runs all parts, then the report; 0 where each ended by itself with status 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=545, help="of all parts together (%(default)s)")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="NxCxHxW->K", help="instead of the suite's")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.seconds
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if ARCHIVE.exists() and "TRITON_CACHE_DIR" not in os.environ:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(CACHE, filter="data")
    worst, waiting = 0, list(PARTS)
    with tempfile.TemporaryDirectory() as tuned:
        os.environ["ACNET_KERNELS_CACHE"] = tuned  # tuned times are this run's alone
        while waiting:
            part, left = waiting.pop(0), end - time.monotonic()
            seconds = min(left, part.seconds or left)
            began = time.monotonic()
            status = run(part, seconds, out, ("--shapes", *args.shapes) if args.shapes else ())
            worst = worst or status
            print(f"{part.name}: {time.monotonic() - began:.0f} of {seconds:.0f} s, status {status}", flush=True)
            if part.name == "first" and not compiled(out):
                waiting.insert(0, WARM)
    subprocess.run([sys.executable, "-m", "benchmarks.gpu_report", str(out)], cwd=ROOT, check=True)
    return int(worst != 0)


if __name__ == "__main__":
    raise SystemExit(main())
