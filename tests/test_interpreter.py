"""Runs tests/triton under Triton's interpreter, chosen before triton is imported: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted((HERE / "triton").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(file: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", str(file)]
    run = subprocess.run(
        command, cwd=HERE.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
