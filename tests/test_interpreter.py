"""Runs tests/triton under Triton's interpreter, chosen before triton is imported: in a process of its own.

The same tests run on a device, by `make test-gpu`: that this command finds them is tested here too.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted((HERE / "triton").glob("test_*.py"))
PARTS = 2  # each a process, which takes seconds to start


@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_kernels_in_the_interpreter(part: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", str(HERE / "triton")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "ACNET_PART": f"{part}/{PARTS}"}
    run = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_the_command_for_a_device_finds_every_test_and_installs_nothing() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")
    if shutil.which("make") is None:
        pytest.skip("there is no make to ask for the command")
    # As from a shell: make that is run by make tells which directory it is in.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    ask = ["make", "-n", "test-gpu"]
    asked = subprocess.run(ask, cwd=HERE.parent, env=env, capture_output=True, text=True, check=True)
    (line,) = asked.stdout.splitlines()
    assert " -n 12 " in line  # one after the other they take longer than a lent device's time
    paths = shlex.split(line.partition(" -n 12 ")[2])
    command = [sys.executable, "-m", "pytest", "--collect-only", *paths]
    run = subprocess.run(
        command, cwd=HERE.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:]
    for file in (*FILES, *(HERE / "gpu").glob("test_*.py")):
        assert f"{file.relative_to(HERE.parent)}::" in run.stdout
    assert "tests/test_fusion.py::test_any_strides[operator-cuda]" in run.stdout  # the C++ operator with a kernel
