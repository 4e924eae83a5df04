"""What the processor says of itself, and which half-precision convolutions it has no fast instructions for."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch

from .._torch_compat import has_amx, has_amx_fp16


@functools.cache
def first() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    return dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.split("\n\n")[0], re.MULTILINE))


def half_units() -> dict[str, torch.dtype]:
    """Instructions by which half-precision convolutions are faster than float32 ones: name → the type.

    AMD's AVX512-BF16 counts (on a Zen 4, bfloat16 steps took half of the float32 ones' time), Intel's does not (on
    an emerald-rapids without AMX they took up to twice as long).
    """
    found = {}
    if has_amx():
        found["AMX"] = torch.bfloat16
    if has_amx_fp16():
        found["AMX-FP16"] = torch.float16
    if first().get("vendor_id") == "AuthenticAMD" and "avx512_bf16" in first().get("flags", "").split():
        found["AVX512-BF16"] = torch.bfloat16
    return found


def slow_half_types() -> frozenset[torch.dtype]:
    """The half-precision types whose convolutions on this CPU are slower than float32 ones between two casts.

    Without the instructions of `half_units`, oneDNN's bfloat16 convolutions on x86-64 take up to twice as long as
    its float32 ones, and its float16 weight gradient is a scalar loop.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    return frozenset((torch.bfloat16, torch.float16)) - set(half_units().values())
