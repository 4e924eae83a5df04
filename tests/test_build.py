"""The optional build: what setup.py decides and says without a compiler, without torch, and when told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup(*, path: str | None = None, hide_torch: bool = False, **environment: str):
    """Runs `setup.py --name`, which decides everything and builds nothing.

    Without a compiler in path only torch's presence matters: an empty module is torch there, quicker to import.
    """
    env = os.environ | environment
    hide = ""
    if path is not None:
        env |= {"PATH": path, "CXX": "c++"}
        hide = "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
    if hide_torch:
        hide = "import sys; sys.modules['torch'] = None; "
    run = "import runpy, sys; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py', run_name='__main__')"
    code = hide + run
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_auto_without_a_compiler_installs_without_the_extension(tmp_path):
    result = setup(path=str(tmp_path), ACNET_KERNELS_BUILD="auto")
    assert result.returncode == 0
    assert "installing without the C++ extension: no C++ compiler found (tried c++, g++, clang++)" in result.stderr


def test_one_without_a_compiler_is_an_error(tmp_path):
    result = setup(path=str(tmp_path), ACNET_KERNELS_BUILD="1")
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr
    assert "ACNET_KERNELS_BUILD=1 asked for it" in result.stderr


def test_without_torch():
    result = setup(hide_torch=True, ACNET_KERNELS_BUILD="auto")
    assert result.returncode == 0
    assert "torch is not installed in the building environment" in result.stderr
    assert setup(hide_torch=True, ACNET_KERNELS_BUILD="1").returncode != 0


def test_zero_never_builds():
    result = setup(ACNET_KERNELS_BUILD="0")
    assert result.returncode == 0
    assert "installing without the C++ extension: ACNET_KERNELS_BUILD=0" in result.stderr


def test_another_value_is_an_error():
    result = setup(ACNET_KERNELS_BUILD="yes")
    assert result.returncode != 0
    assert "ACNET_KERNELS_BUILD must be auto, 0, 1 or portable, got 'yes'" in result.stderr


MISSING = """
from pathlib import Path

import pytest
exists = Path.exists
Path.exists = lambda self: False if self.name.endswith('abi3.so') else exists(self)
import torch, acnet_kernels as ak
from acnet_kernels.ops import _extension
assert 'the C++ extension is not built' in _extension.WHY_MISSING, _extension.WHY_MISSING
assert 'ACNET_KERNELS_BUILD=1' in _extension.WHY_MISSING
assert _extension.WHY_CUDA_MISSING == _extension.WHY_MISSING
block = ak.ACBlock(3, 4, 3, padding=1).eval()
x = torch.randn(2, 3, 5, 5)
expected = sum(bn(conv(x)) for bn, conv in zip(block.norms().values(), block.convs().values()))
torch.testing.assert_close(block(x), expected)
from acnet_kernels.ops.fuse_blocks import SCHEMAS
op = torch.ops.acnet_kernels.fuse_blocks.default
assert str(op._schema) == str(torch._C.parse_schema('acnet_kernels::' + SCHEMAS[0]))
"""


def test_without_the_extension_the_same_operator_runs_in_pytorch():
    result = subprocess.run([sys.executable, "-c", MISSING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def sources(target: Path) -> Path:
    """A copy of what is built from."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.failed.txt")
    for name in ("csrc", "acnet_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


@pytest.mark.parametrize("switch", ["auto", "1"])
def test_a_failing_compiler(tmp_path, switch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *csrc*) exit 1;; *) exec /usr/bin/c++ "$@";; esac\n')
    compiler.chmod(0o755)
    place = tmp_path / "sources"
    place.mkdir()
    env = os.environ | {"CXX": str(compiler), "ACNET_KERNELS_BUILD": switch, "CUDA_HOME": "/nonexistent"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(build, cwd=sources(place), env=env, capture_output=True, text=True, check=False)
    note = place / "acnet_kernels" / "_C.failed.txt"
    if switch == "1":
        assert result.returncode != 0
        assert not note.exists()
        return
    assert result.returncode == 0, result.stderr
    assert "INSTALLING WITHOUT acnet_kernels._C: its build failed" in result.stderr
    assert note.read_text() in result.stderr
    told = "from acnet_kernels.ops._extension import WHY_MISSING; print(WHY_MISSING)"
    asked = subprocess.run([sys.executable, "-c", told], cwd=place, capture_output=True, text=True, check=True)
    assert "the C++ extension is not built: its build failed" in asked.stdout


def test_the_source_distribution_holds_all_that_is_built_from(tmp_path):
    env = os.environ | {"ACNET_KERNELS_BUILD": "0"}
    place = tmp_path / "sources"
    place.mkdir()
    pack = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(pack, cwd=sources(place), env=env, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    needed |= {"setup.py", "pyproject.toml", "LICENSE"}
    assert needed <= packed
