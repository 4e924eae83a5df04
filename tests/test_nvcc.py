"""The CUDA source compiles for every architecture that is built, without spills. No device is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
SITE = Path(torch.__file__).parents[1]
# CUDA's headers are torch's, which those of another major version do not take.
OTHER = (
    torch.version.cuda is not None
    and NVCC is not None
    and f"release {torch.version.cuda.split('.')[0]}."
    not in (subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=False).stdout)
)
INCLUDES = [SITE / "torch" / "include", *(SITE / "nvidia").glob("cu*/include")]


@pytest.mark.skipif(NVCC is None, reason="no nvcc: the CUDA source cannot be compiled here")
@pytest.mark.skipif(OTHER, reason=f"nvcc is of another CUDA than torch, which is built with {torch.version.cuda}")
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_compiles_without_spills(architecture, tmp_path):
    assert NVCC is not None
    command = [NVCC, "-cubin", f"-arch=sm_{architecture}", "-O3", "-std=c++17", "-Xptxas", "-v", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in INCLUDES)]
    command += [str(ROOT / "csrc" / "fuse_cuda.cu"), "-o", str(tmp_path / "fuse.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "fuse_blocks_kernel" in result.stderr
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", result.stderr) == [
        ("0", "0", "0")
    ]
    assert (
        int(re.search(r"Used (\d+) registers", result.stderr)[1]) <= 64
    )  # four CTAs of 256 threads a multiprocessor
