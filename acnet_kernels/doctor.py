"""What this machine has: versions, compilers, and the extension."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata

import torch

from . import __version__
from .ops import _extension, launch


def report() -> list[tuple[str, str]]:
    """(what, finding) pairs, each a line of `python -m acnet_kernels doctor`."""
    return [
        ("acnet_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, CPU kernels {torch.backends.cpu.get_cpu_capability()}"),
        ("triton", _version("triton")),
        ("numpy", _version("numpy")),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("C++ compiler", _tool(os.environ.get("CXX", "c++"), "g++", "clang++")),
        ("ninja", _tool("ninja") if shutil.which("ninja") else _version("ninja")),
        ("nvcc", _tool("nvcc")),
        ("CUDA", _cuda()),
        ("extension", _extension.WHY_MISSING or "loaded"),
        ("autograd node", _extension.WHY_NODE_MISSING or "loaded"),
        ("CUDA kernels", _extension.WHY_CUDA_MISSING or "loaded"),
        ("launches", _launches()),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes no options."""


def main(options: argparse.Namespace | None = None) -> int:
    """Prints the report."""
    lines = report()
    width = max(len(what) for what, _ in lines)
    print("\n".join(f"{what.ljust(width)}  {finding}" for what, finding in lines))
    return 0


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _tool(*names: str) -> str:
    """Path and version line of the first of the commands that exists."""
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        return f"not found ({', '.join(names)})"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    # The line with a version number; nvcc prints dates and a copyright before it.
    version = next((line for line in output.splitlines() if re.search(r"\d+\.\d+", line)), "no version printed")
    return f"{path}: {version}"


def _launches() -> str:
    why = launch.WHY_TRITONS
    return f"by Triton's launcher: {why}" if why else "a direction's in one call of the CUDA driver's"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, but there is no usable device"
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return f"{torch.version.cuda}, {torch.cuda.device_count()} × {torch.cuda.get_device_name()} ({capability})"
