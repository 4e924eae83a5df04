"""Where a benchmark runs: the machine's name, its cache and clock, and the versions that go into every row."""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import re
import shlex
import sys
from pathlib import Path

import torch

from acnet_kernels.backends.device_info import cpu_name, device_name


def cache_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes of the last cache before memory: L2 of a GPU, the largest cache of CPU 0."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 * 2**20)


def machine_class(device: torch.device | str = "cpu") -> str:
    """The directory name under benchmarks/results for this kind of machine: 'xeon-emerald-rapids-2core'."""
    device = torch.device(device)
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return _slug(re.sub(r"\b(Intel|AMD|Processor|CPU)\b|@ *\S+", "", cpu_name())) + f"-{os.cpu_count()}core"


def _slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """The Row fields that say where and with what a run was made."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    device = torch.device(device)
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name.removesuffix('.__main__')}" if module else os.path.relpath(sys.argv[0])
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
        "driver": _nvml(device).driver if device.type == "cuda" else "",
        "command": f"python {program} {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
    }


def clock_mhz(device: torch.device | str = "cpu") -> str:
    """The clock now, in MHz: the fastest core's, or a GPU's multiprocessors'; '' where it cannot be known."""
    device = torch.device(device)
    if device.type == "cuda":
        return _nvml(device).clock()
    try:
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return f"{max(map(float, found)):.0f}" if found else ""


class _Nvml:
    """What NVIDIA's management library says of a device, '' where there is no answer.

    It tells the clock after every measurement; nvidia-smi would be a process of a tenth of a second each time.
    """

    def __init__(self, uuid: str) -> None:
        self.driver, self.handle = "", ctypes.c_void_p()
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        text = ctypes.create_string_buffer(96)
        if self.library.nvmlInit_v2() == 0 and self.library.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            self.driver = text.value.decode()
            self.library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(self.handle))

    def clock(self) -> str:
        """The multiprocessors' clock now, in MHz."""
        found = ctypes.c_uint()
        if not self.handle or self.library.nvmlDeviceGetClockInfo(self.handle, _SM_CLOCK, ctypes.byref(found)) != 0:
            return ""
        return str(found.value)


_SM_CLOCK = 1


@functools.cache
def _nvml(device: torch.device) -> _Nvml:
    return _Nvml(str(torch.cuda.get_device_properties(device).uuid))
