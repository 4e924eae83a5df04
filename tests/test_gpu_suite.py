"""What runs on a lent GPU, as far as it runs without one: on that day nothing may be left to find out."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")

from benchmarks import gpu_first_run, gpu_report, gpu_suite, harness

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


REHEARSAL = """
import math, sys, time
from pathlib import Path
from benchmarks import gpu_suite, stand_in
from benchmarks.shapes import Shape

stand_in.install("launch")
out = Path(sys.argv[1])
shapes = [Shape.parse("2x4x5x5->4"), Shape.parse("2x8x5x5->8")]

def broken(inputs):
    raise RuntimeError("on purpose")

table = {"conv": {"broken": broken, **gpu_suite.CONVOLUTIONS["conv"]}}
gpu_suite.Suite(out, shapes, ("bf16",)).phases(shapes, table)
gpu_suite.Suite(out, shapes, ("bf16",), until=time.time() - 1).phases(shapes, table)
"""


def test_a_contender_that_fails_takes_no_row_from_the_others(tmp_path: Path) -> None:
    """On a driver that does nothing; every contender by the device's clock and the host's, none when it is late."""
    env = {**os.environ, "ACNET_STAND_IN": "launch", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REHEARSAL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FAILED broken conv 2x4x5x5->4 bf16 RuntimeError: on purpose" in done.stdout
    assert "out of time: left out phases from 2x4x5x5->4 bf16 and what follows it" in done.stdout
    rows = [(row.contender, row.shape, row.metric) for row in harness.read_csv(tmp_path / gpu_suite.CSV)]
    assert rows == [
        row
        for shape in ("2x4x5x5->4", "2x8x5x5->8")
        for row in (
            ("broken", shape, "failed"),
            *((name, shape, metric) for metric in ("graph_ms", "time_ms") for name in ("library", "triton")),
        )
    ]
    text = gpu_report.write(tmp_path)
    assert "## Contenders that failed" in text
    assert "| 2x8x5x5->8 | bf16  | conv " in text


HANGS = """
import os, pathlib, shutil, time
out = pathlib.Path(os.environ["GPU_SUITE_OUT"])
shutil.copy(out / "measured.csv", out / "gpu_suite.csv")
time.sleep(60)
"""


def test_a_part_that_hangs_leaves_its_rows_and_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = harness.Report("cpu", tmp_path / "measured.csv")
    for i in range(3):
        report.add("ours", str(i), "", "", "", "time_ms", float(i))
    parts = [
        gpu_first_run.Part("first", 1, ("-c", HANGS)),
        gpu_first_run.Part("ends", 15, ("-c", "print('it ran'); raise SystemExit(3)")),
    ]
    monkeypatch.setattr(gpu_first_run, "PARTS", parts)
    monkeypatch.setattr(gpu_first_run, "ARCHIVE", tmp_path / "none")
    monkeypatch.setattr(gpu_first_run, "compiled", lambda _: True)
    assert gpu_first_run.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "first: 1 of 1 s, status -9" in said
    assert "ends: 0 of 15 s, status 3" in said
    assert [row.mode for row in harness.read_csv(tmp_path / gpu_suite.CSV)] == ["0", "1", "2"]
    assert "it ran" in (tmp_path / "gpu_first_run.log").read_text()
    assert (tmp_path / "gpu_suite.md").exists()


def test_the_parts_fit_the_time_and_the_last_takes_what_is_left() -> None:
    *parts, last = gpu_first_run.PARTS
    assert sum(part.seconds for part in parts) <= 545
    assert last.seconds is None
    known = {part.arguments[2] for part in (*parts, last) if "benchmarks.gpu_suite" in part.arguments}
    assert known == set(gpu_suite.PARTS) - {"warm"}
