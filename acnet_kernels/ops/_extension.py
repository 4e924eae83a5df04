"""Loads the compiled extension, which registers the C++ operators: _C.abi3.so, and _C_cuda.abi3.so for CUDA.

Says too whether Triton is there, whose kernels need no build.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent.parent
LIBRARY = _PACKAGE / "_C.abi3.so"


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

# A checkout is imported from where it is, whatever is installed: it needs a build of its own.
_HOW = "-e ." if (_PACKAGE.parent / "setup.py").exists() else "."
# Why the C++ operators are missing; empty when they are registered.
WHY_MISSING = _load(
    LIBRARY,
    "the C++ extension",
    f"in the sources, with a C++ compiler present: `pip install --no-build-isolation {_HOW}`, in which "
    "ACNET_KERNELS_BUILD=1 turns a failure into an error",
)
LOADED = not WHY_MISSING


def _load_cuda() -> str:
    if not LOADED:
        return WHY_MISSING
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return _load(_PACKAGE / "_C_cuda.abi3.so", "the CUDA part of the extension", "install where nvcc is found")


def _load_node() -> tuple[Any, str]:
    if not LOADED:
        return None, WHY_MISSING
    name = "_node_" + re.sub(r"\W", "_", torch.__version__)
    try:
        return importlib.import_module(f"acnet_kernels.{name}"), ""
    except ImportError as error:
        return None, f"the C++ autograd node is not built for this Python and torch {torch.__version__} ({error})"


# The module that runs a step in one call, or None, and why: Python's own node serves then.
NODE, WHY_NODE_MISSING = _load_node()

# Why the CUDA kernels are missing; empty when they are there. Without them CUDA tensors go through PyTorch.
WHY_CUDA_MISSING = _load_cuda()
