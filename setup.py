"""Builds csrc/ into acnet_kernels/_C.abi3.so where that is possible; everything else is in pyproject.toml.

ACNET_KERNELS_BUILD=auto (default) builds where a C++ compiler and torch are found and installs without the
extension where not; 1 makes a missing compiler an error; 0 never builds.
"""

import glob
import os
import shutil
import sys

from setuptools import setup

TORCH_TARGET = "0x020a000000000000"  # the LibTorch stable ABI of torch 2.10: one binary for every later torch


def why_not_build() -> str | None:
    """The reason the extension cannot be built here, or None."""
    try:
        import torch  # noqa: F401 - only its presence matters here
    except ImportError:
        return "torch is not installed in the building environment (use pip install --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return f"no C++ compiler found (tried {compiler}, g++, clang++)"
    return None


def extension() -> dict:
    """The setup() arguments that build csrc/, or {} with the reason printed."""
    switch = os.environ.get("ACNET_KERNELS_BUILD", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"ACNET_KERNELS_BUILD must be auto, 0 or 1, got {switch!r}")
    sources = sorted(glob.glob("csrc/*.cpp"))
    if not sources:
        return {}
    reason = "ACNET_KERNELS_BUILD=0" if switch == "0" else why_not_build()
    if reason is not None:
        message = f"acnet_kernels: installing without the C++ extension: {reason}"
        if switch == "1":
            raise SystemExit(message + " (ACNET_KERNELS_BUILD=1 asked for it)")
        print(message, file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    module = CppExtension("acnet_kernels._C", sources, extra_compile_args=flags, py_limited_api=True)
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
