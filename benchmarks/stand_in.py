"""An H100 that accepts every launch and computes nothing, for a machine without: ACNET_STAND_IN=compile or launch.

With `compile` Triton's JIT, ptxas and launcher run for real, against stand_in.c in place of the driver, on tensors
of the CPU: what a run will need is compiled into Triton's cache, which can travel. With `launch` nothing is. The
library's convolutions compute nothing either. So the GPU suite is rehearsed to its end, but for its numbers.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_only
from triton.backends.nvidia import driver
from triton.runtime.jit import JITFunction

MODES = ("compile", "launch")
CAPABILITY = (9, 0)
PROCESSORS = 132
HERE = Path(__file__).parent


def mode() -> str | None:
    """What the environment asks for: one of MODES, or None for a real device."""
    asked = os.environ.get("ACNET_STAND_IN")
    if asked is not None and asked not in MODES:
        raise ValueError(f"ACNET_STAND_IN must be one of {MODES}, got {asked!r}")
    return asked


def install(how: str, source: Path = HERE / "stand_in.c") -> ctypes.CDLL | None:
    """From now on Triton launches on the stand-in, and this package takes the CPU for its device.

    Returns the driver built from `source`, with `compile`.
    """
    driver = install_kernels(how, source)
    _convolutions()
    return driver


def install_kernels(how: str, source: Path = HERE / "stand_in.c") -> ctypes.CDLL | None:
    """`install`, but that the library's convolutions do compute, as the CPU's."""
    library = _load_library(source) if how == "compile" else None
    _driver(how)
    _streams()
    _paths()
    return library


def _driver(how: str) -> None:
    class Driver(driver.CudaDriver):
        def __init__(self) -> None:
            self.launcher_cls = driver.CudaLauncher
            if how == "compile":
                self.utils = driver.CudaUtils()
            self.get_device_capability = lambda *_: CAPABILITY
            self.get_current_stream = self.get_current_device = lambda *_: 0
            self.set_current_device = lambda *_: None

    triton.runtime.driver.set_active(Driver())
    if how == "launch":
        JITFunction._do_compile = _uncompiled


def _load_library(source: Path) -> ctypes.CDLL:
    """Builds the driver's stand-in, and has Triton link its launchers to it."""
    folder = Path(tempfile.mkdtemp(prefix="stand-in-"))
    atexit.register(shutil.rmtree, folder)
    library, include = folder / "libcuda.so.1", Path(driver.__file__).parent / "include"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or "cc"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        f"-Wl,-soname,{library.name}",
        f"-I{include}",
        f"-I{HERE}",
        str(source),
    ]
    subprocess.run([*command, "-o", str(library)], check=True)
    triton.knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class _Kernel:
    """In place of a compiled kernel."""

    packed_metadata = function = None

    def launch_metadata(self, *_: Any) -> None:
        """Nothing."""

    def run(self, *_: Any) -> None:
        """Nothing."""


def _uncompiled(self: Any, key: Any, signature: Any, device: int, *_: Any) -> _Kernel:
    kernel = self.device_caches[device][0][key] = _Kernel()
    return kernel


class _Event:
    """Every kernel takes a microsecond."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Nothing."""

    synchronize = record

    def elapsed_time(self, _: _Event) -> float:
        """Milliseconds."""
        return 1e-3


class _Stream:
    def wait_stream(self, _: _Stream) -> None:
        """Nothing."""


class _Graph:
    """Captured and replayed: nothing."""

    def replay(self) -> None:
        """Nothing."""


def _streams() -> None:
    """torch.cuda's events, streams and graphs, as far as the suite uses them."""
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_: CAPABILITY
    told = SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=PROCESSORS)
    cuda.get_device_properties = lambda *_: told
    cuda.synchronize = lambda *_: None
    cuda.current_device = lambda: 0
    cuda.Event, cuda.Stream, cuda.CUDAGraph, cuda.current_stream = _Event, _Stream, _Graph, _Stream
    cuda.stream = cuda.graph = lambda *_: contextlib.nullcontext()


def _uncomputed(operator: Any) -> Callable[..., Any]:
    """What an operator returns for its arguments, unwritten; 4-D tensors in channels_last where one of them is."""

    def empty(*args: Any) -> Any:
        given = [t for t in args if isinstance(t, Tensor) and t.dim() == 4]
        last = any(t.is_contiguous(memory_format=torch.channels_last) for t in given)

        def unwritten(t: Tensor) -> Tensor:
            layout = torch.channels_last if last and t.dim() == 4 else torch.contiguous_format
            return torch.empty_like(t, device="cpu", memory_format=layout)

        found = operator(*tree_map_only(Tensor, lambda t: t.to("meta"), args))
        return tree_map_only(Tensor, unwritten, found)

    return empty


def _paths() -> None:
    """This package's CUDA paths for tensors of the CPU."""
    from acnet_kernels.backends import node, timer
    from acnet_kernels.ops import autocorrelation, bn_sum, epilogue, triton_block, triton_step
    from acnet_kernels.steps import assignment, convolution, recompute

    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the CPU's says nothing of CUDA's
    assignment.DEVICE = "cpu"
    node.takes = lambda x, inputs: False  # the C++ node is for what the CPU does for itself
    timer.cuda_sleep = lambda cycles: None
    convolution._SLOW_HALF_TYPES = frozenset()
    recompute._has_triton = lambda x: x.dtype != torch.float64
    ours = torch.library.Library("acnet_kernels", "FRAGMENT")
    for name, kernel in {
        **bn_sum.on_cuda,
        **epilogue.on_cuda,
        "cross_correlation": autocorrelation.on_cuda,
    }.items():
        ours.impl(name, kernel, "CPU", allow_override=True)
    ours.impl("triton_forward", triton_block._forward, "CPU")
    ours.impl("triton_input_grad", triton_block._input_grad, "CPU")
    ours.impl("triton_weight_grads", triton_block._weight_grads, "CPU")
    ours.impl("triton_step_", triton_step.run_forward, "CPU")
    ours.impl("triton_step_backward_", triton_step.run_backward, "CPU")
    ours.impl("triton_bn_sum_", triton_step.run_bn_sum, "CPU")
    _LIBRARIES.append(ours)  # it unregisters when it is collected


def _convolutions() -> None:
    aten = torch.library.Library("aten", "IMPL")
    for name in ("convolution", "convolution_backward"):
        aten.impl(name, _uncomputed(getattr(torch.ops.aten, name).default), "CPU")
    _LIBRARIES.append(aten)


_LIBRARIES: list[torch.library.Library] = []
