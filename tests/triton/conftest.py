"""These tests run where kernels can: on a GPU, or under Triton's interpreter on CPU tensors.

The interpreter must be chosen before triton is imported, so tests/test_interpreter.py runs this directory in a
process of its own with TRITON_INTERPRET=1. A process with neither collects nothing here. With ACNET_STAND_IN the
tests launch and fail, for Triton's cache: what they need on a GPU is then compiled (benchmarks/stand_in.py).
"""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_STANDS_IN = "ACNET_STAND_IN" in os.environ
collect_ignore_glob = [] if _INTERPRETED or _STANDS_IN or torch.cuda.is_available() else ["test_*.py"]
if _STANDS_IN:
    from benchmarks import stand_in

    stand_in.install(stand_in.mode())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """ACNET_PART, like 2/6: every sixth test from the second on, as tests/test_interpreter.py shares them out."""
    part, parts = map(int, os.environ.get("ACNET_PART", "1/1").split("/"))
    items[:] = items[part - 1 :: parts]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if _INTERPRETED or _STANDS_IN else "cuda")


@pytest.fixture(autouse=True, scope="session")
def _tf32_as_on_the_device() -> None:
    """The interpreter, which ignores "tf32", takes 10 bits of a dot's fp32 operands, as tensor cores do."""
    if not _INTERPRETED:
        return
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_dot

    def truncated(handle: TensorHandle) -> TensorHandle:
        if handle.data.dtype != np.float32:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(builder, a, b, d, input_precision, *rest):
        if input_precision == ir.INPUT_PRECISION.TF32:
            a, b = truncated(a), truncated(b)
        return exact(builder, a, b, d, input_precision, *rest)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> None:
    if _INTERPRETED:
        import quick_interpreter

        quick_interpreter.install()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element no kernel writes cannot pass."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
