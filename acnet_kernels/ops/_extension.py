"""Loads the compiled extension, which registers the C++ operators: _C.abi3.so, and _C_cuda.abi3.so for CUDA.

Says too whether Triton is there, whose kernels need no build.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent.parent


def _load(library: Path, what: str, remedy: str) -> str:
    if not library.exists():
        note = library.with_name(library.name.split(".")[0] + ".failed.txt")  # which setup.py leaves
        why = f": {note.read_text()}" if note.exists() else ""
        return f"{what} is not built{why} ({remedy})"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{what} does not load into torch {torch.__version__}: {error.__cause__ or error}"
    return ""


# Whether Triton is installed: without it CUDA tensors go through plain PyTorch. Importing it takes long.
TRITON = importlib.util.find_spec("triton") is not None

# Why the C++ operators are missing; empty when they are registered.
WHY_MISSING = _load(
    _PACKAGE / "_C.abi3.so",
    "the C++ extension",
    "install with a C++ compiler present and `pip install --no-build-isolation`, in which ACNET_KERNELS_BUILD=1 "
    "turns a failure into an error",
)
LOADED = not WHY_MISSING


def _load_cuda() -> str:
    if not LOADED:
        return WHY_MISSING
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return _load(_PACKAGE / "_C_cuda.abi3.so", "the CUDA part of the extension", "install where nvcc is found")


# Why the CUDA kernels are missing; empty when they are there. Without them CUDA tensors go through PyTorch.
WHY_CUDA_MISSING = _load_cuda()
