"""Which machine this is: the names that measured times are filed under."""

from __future__ import annotations

import functools
import platform
import re
from typing import NamedTuple

import torch

from ..steps import cpuinfo

# Family 6 models whose /proc/cpuinfo name says no more than "Xeon Processor" under virtualisation.
INTEL_MODELS = {
    85: "cascade-lake",
    106: "ice-lake",
    143: "sapphire-rapids",
    173: "granite-rapids",
    207: "emerald-rapids",
}


class Machine(NamedTuple):
    """The type of device, and its name with the threads in use."""

    device: str
    name: str


@functools.cache
def cpu_name() -> str:
    """The processor's name, with its code name where the model number gives it away, and its fast half precision.

    Virtual machines of one name come with AMX or AVX512-BF16 and without, and half-precision steps take other paths
    then.
    """
    entry = cpuinfo.first()
    name = re.sub(r"\((R|TM)\)", "", entry.get("model name", platform.processor() or platform.machine()))
    notes = []
    if entry.get("vendor_id") == "GenuineIntel" and entry.get("cpu family") == "6":
        notes = [code] if (code := INTEL_MODELS.get(int(entry["model"]))) else []
    notes += cpuinfo.half_units()
    return f"{name} ({', '.join(notes)})" if notes else name


def instructions() -> str:
    """The vector instructions that the processor has, and up to which of them PyTorch's own kernels use."""
    flags = sorted(flag for flag in cpuinfo.first().get("flags", "").split() if flag.startswith(("avx", "amx")))
    return " ".join((torch.backends.cpu.get_cpu_capability(), *flags))


def device_name(device: torch.device | str = "cpu") -> str:
    """'NVIDIA H100 …', or the processor with the threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def this_machine(device: str) -> Machine:
    """The machine that tensors of this device type are computed on; 'meta' stands for the CPU."""
    return _machine(device, torch.cuda.current_device() if device == "cuda" else torch.get_num_threads())


@functools.cache
def _machine(device: str, _: int) -> Machine:
    """this_machine() while it is this one: the current GPU, or a CPU with as many threads."""
    if device == "meta":
        device = "cpu"
    return Machine(device, device_name(device) if device in ("cpu", "cuda") else device)
