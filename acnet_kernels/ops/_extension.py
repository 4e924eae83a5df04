"""Loads the compiled extension, acnet_kernels/_C.abi3.so, which registers the C++ operators."""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent.parent / "_C.abi3.so"


def _load() -> str | None:
    if not _LIBRARY.exists():
        return (
            "the C++ extension is not built (install with a C++ compiler present and "
            "`pip install --no-build-isolation`, in which ACNET_KERNELS_BUILD=1 turns a failure into an error)"
        )
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the C++ extension does not load into torch {torch.__version__}: {error}"
    return None


# Why the C++ operators are missing, or None when they are registered.
MISSING = _load()
