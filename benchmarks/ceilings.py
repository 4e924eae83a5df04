"""The two ceilings of a machine, measured: bytes that a copy moves and operations that a matrix product does."""

from __future__ import annotations

import torch

from . import harness

CONTENDERS = ("copy", "gemm")
MODE = "ceiling"


def measure(
    report: harness.Report, dtype: torch.dtype, device: torch.device, seconds: float
) -> tuple[float, float]:
    """(GB/s of a copy beyond the cache, GFLOP/s of a square matrix product in dtype); adds both to the report."""
    nbytes = 2 * max(harness.cache_bytes(device), 2**26)
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    calls = {"copy": harness.copy_calls(nbytes, device), "gemm": [lambda: a @ b]}
    samples = harness.measure(calls, device, warm_up=seconds / 4, seconds=seconds)
    moved, done = samples["copy"].rate(nbytes), samples["gemm"].rate(2 * n**3)
    report.add("copy", MODE, f"{nbytes} bytes", dtype, "contiguous", "gb_per_s", moved)
    report.add("gemm", MODE, f"{n}x{n}x{n}", dtype, "contiguous", "gflop_per_s", done)
    return moved.p50, done.p50
