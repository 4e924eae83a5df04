"""Builds csrc/ into acnet_kernels/_C.abi3.so (and _C_cuda.abi3.so) where possible; the rest is in pyproject.toml.

ACNET_KERNELS_BUILD=auto (default) builds where a C++ compiler and torch are found and installs without the
extension where not, or where the compiler fails; 1 makes either an error; 0 never builds. The CUDA kernels are a
library of their own, built where nvcc is found and torch has CUDA, so that the CPU part loads everywhere; so is the
autograd node, which only the Python and torch that it is built for can load. ACNET_KERNELS_BUILD=portable is 1
without the node: a wheel for every CPython from 3.10 and every torch from 2.10 (`make wheel`).
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

TORCH_TARGET = "0x020a000000000000"  # the LibTorch stable ABI of torch 2.10: one binary for every later torch
FLAGS = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
HOST_FLAGS = ["-fvisibility=hidden", "-ffp-contract=off"]  # the same arithmetic on every instruction set
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


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


def why_not_cuda() -> str | None:
    """The reason the CUDA kernels cannot be built here, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
    if not nvcc:
        return "nvcc was not found"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = version.split("release ")[1].split(",")[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release}, torch of {torch.version.cuda}"
    return None


def without_paths() -> list[str]:
    """Flags by which messages name files by their place in this project or torch, not on the building machine."""
    import torch

    places = (Path(__file__).resolve().parent, Path(torch.__file__).parent / "include")
    return [f"-fmacro-prefix-map={place}/=" for place in places]


def cuda_module():  # type: ignore[no-untyped-def]
    """The extension with the CUDA kernels: the CUDA runtime linked in, so that only the driver must fit."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    # What a bare nvcc lacks comes with torch's own packages: site-packages/nvidia/cu13/{include,lib}.
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    return CppExtension(
        "acnet_kernels._C_cuda",
        sorted(glob.glob("csrc/*.cu")),
        include_dirs=[str(path) for path in wheels.glob("cu*/include")],
        library_dirs=[f"{CUDA_HOME}/lib64", *(str(path) for path in wheels.glob("cu*/lib"))],
        libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={
            # nvcc hands its compiler a path with a space as two.
            "cxx": FLAGS + HOST_FLAGS + without_paths(),
            "nvcc": [*FLAGS, "-DUSE_CUDA", *(f"-Xcompiler={flag}" for flag in without_paths() if " " not in flag)],
        },
        py_limited_api=True,
    )


def extension() -> dict:
    """The setup() arguments that build csrc/, or {} with the reason printed."""
    switch = os.environ.get("ACNET_KERNELS_BUILD", "auto")
    if switch not in ("auto", "0", "1", "portable"):
        raise SystemExit(f"ACNET_KERNELS_BUILD must be auto, 0, 1 or portable, got {switch!r}")
    portable = switch == "portable"
    required = portable or switch == "1"
    reason = "ACNET_KERNELS_BUILD=0" if switch == "0" else why_not_build()
    if reason is not None:
        message = f"acnet_kernels: installing without the C++ extension: {reason}"
        if required:
            raise SystemExit(f"{message} (ACNET_KERNELS_BUILD={switch} asked for it)")
        print(message, file=sys.stderr)
        return {}
    import torch
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(glob.glob("csrc/*.cpp"))
    flags = {"cxx": FLAGS + HOST_FLAGS + without_paths()}
    modules = [CppExtension("acnet_kernels._C", sources, extra_compile_args=flags, py_limited_api=True)]
    if not portable:
        # The autograd node, of one Python and one torch, which its name says: by torch's choice of C++ standard.
        name = "_node_" + re.sub(r"\W", "_", torch.__version__)
        flags = {"cxx": ["-O3", *HOST_FLAGS, *without_paths()]}
        modules.append(
            CppExtension(f"acnet_kernels.{name}", sorted(glob.glob("csrc/node/*.cpp")), extra_compile_args=flags)
        )
    no_cuda = why_not_cuda()
    if no_cuda is None:
        modules.append(cuda_module())
    else:
        print(f"acnet_kernels: building without CUDA kernels: {no_cuda}", file=sys.stderr)
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": build_command(required)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if portable else {},
    }


def tell(library: Path, reason: str | None) -> None:
    """Leaves the reason where a library failed, for ops/_extension.py, in place of one of an earlier build."""
    note = library.with_name(library.name.split(".")[0] + ".failed.txt")
    note.unlink(missing_ok=True)
    if reason is not None:
        library.unlink(missing_ok=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(reason)


def build_command(required: bool):  # type: ignore[no-untyped-def]
    """The command that builds the extension: stripped unless with --debug, and without it where building fails.

    required: a failure is an error.
    """
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            self.in_source = self.inplace or self.editable_mode  # setuptools resets the former while it builds
            super().run()

        def build_extensions(self) -> None:
            everything = self.extensions
            for extension in everything:  # one by one: the CUDA kernels' failure is not the others'
                self.extensions = [extension]
                self.build_one(extension)
            self.extensions = everything

        def build_one(self, extension) -> None:  # type: ignore[no-untyped-def]
            if not self.debug:  # symbols are nine tenths of the library
                extension.extra_compile_args["cxx"].append("-g0")
                extension.extra_link_args.append("-Wl,-s")
            reason = None
            try:
                super().build_extensions()
            except Exception as error:
                if required:
                    raise
                reason = f"its build failed: {error}"
                line = "=" * 100
                print(
                    f"{line}\nacnet_kernels: INSTALLING WITHOUT {extension.name}: {reason}\n{line}", file=sys.stderr
                )
                extension.optional = True  # or setuptools looks for what is not there
            built = Path(self.get_ext_fullpath(extension.name))
            tell(built, reason)
            if self.in_source:
                tell(Path(__file__).parent / "acnet_kernels" / built.name, reason)

    return Build


setup(**extension())
