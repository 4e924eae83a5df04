"""Triton's kernels launched without Triton: against a driver that keeps every launch, and where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acnet_kernels import doctor
from acnet_kernels.ops import launch

HERE = Path(__file__).parent


def test_what_the_driver_gets() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")
    if launch.WHY_TRITONS:
        pytest.skip(launch.WHY_TRITONS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        str(HERE / "launches"),
    ]
    env = {**os.environ, "ACNET_RECORDING": "1"}
    run = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def launched(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [launch.empty((2,), torch.float32, tensors[0].device).copy_(tensors[0] + tensors[1])]


def test_a_routine_runs_as_it_is_where_tritons_launcher_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WHY_TRITONS", "a test says so")
    monkeypatch.setattr(launch, "_remember", lambda *_: pytest.fail("nothing is recorded"), raising=False)
    for _ in range(2):
        (found,) = launch.run(launched, [torch.ones(2), torch.full((2,), 2.0)])
        assert found.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("triton", "missing", "version", "why"),
    [
        (False, "", "3.8.0", "Triton is not installed"),
        (True, "the C++ extension is not built", "3.8.0", "the C++ extension is not built"),
        (True, "", "3.10.1", "compiled kernels of Triton 3.10.1 are not known, only of 3.6, 3.7, 3.8"),
        (True, "", "3.6.0", ""),
        (True, "", "3.8.1+git", ""),
    ],
)
def test_doctor_says_which_launcher_runs_and_why(
    triton: bool, missing: str, version: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TRITON", triton), ("WHY_MISSING", missing), ("LOADED", not missing)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    assert launch._why_tritons() == why
    monkeypatch.setattr(launch, "WHY_TRITONS", why)
    said = dict(doctor.report())["launches"]
    assert said == (f"by Triton's launcher: {why}" if why else "a direction's in one call of the CUDA driver's")
