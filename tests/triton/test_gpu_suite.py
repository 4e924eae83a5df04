"""The GPU suite runs to its end, on one tiny problem: it must not fail on the day there is a GPU."""

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite


def test_suite_runs_and_writes(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # poisoning is no part of it
    monkeypatch.setattr(gpu_suite, "PROBLEMS", gpu_suite.PROBLEMS[:1])
    monkeypatch.setattr(gpu_suite, "DEPTHWISE", [])
    monkeypatch.setattr(gpu_suite, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(gpu_suite.configs, "variants", lambda *_: [gpu_suite.SMALL])
    if device.type == "cpu":
        monkeypatch.setattr(gpu_suite.phases, "DEVICE", "cpu")
    arguments = ["--device", device.type, "--out", str(tmp_path), "--shapes", "1x4x3", "--dtypes", "fp32"]
    assert gpu_suite.main([*arguments, "--slice", "0.01", "--rounds", "1"]) == 0
    text, rows = (tmp_path / "gpu_suite.md").read_text(), (tmp_path / "gpu_suite.csv").read_text()
    assert "0 faults" in text
    assert "left out" not in text
    for phase in (*gpu_suite.PHASES, *gpu_suite.MAPS_MOVED, "step", "block step", "conv configuration"):
        assert f",{phase}," in rows
    for assignment in itertools.product(("vendor", "triton"), repeat=3):
        assert f"branches ({' '.join(assignment)}),block step," in rows
