"""What runs on a lent GPU, as far as it runs without one: on that day nothing may be left to find out."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")


ROOT = Path(__file__).parents[1]


def test_the_gradients_of_the_hugest_map_are_finite_in_half_precision() -> None:
    """The device's own test of them, at its own image size, would else compare NaN."""
    spec = importlib.util.spec_from_file_location("gpu_test_device", ROOT / "tests/gpu/test_device.py")
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    x = there.huge_map(1, 2, 1024, "cpu")
    assert x.abs().max() > 1e-2
    products = torch.einsum("nkhw,nchw->kc", x.float(), x.float())
    assert products.half().isfinite().all()
