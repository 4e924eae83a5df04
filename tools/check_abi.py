"""Tests a wheel where it may be installed: under another CPython and another torch.

    python tools/check_abi.py dist/acnet_kernels-*.whl /path/to/other/python

Installs the wheel alone into an empty directory, and runs there, with the other interpreter, the tests of what
is compiled and of what a block computes. It needs torch >= 2.10, numpy, pytest and hypothesis. Prints versions
and what `doctor` finds; exits with pytest's status.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = (
    *("fusion", "bn_sum", "open_sum", "direct_operators", "epilogue", "branches", "branch_lists"),
    *("autocorrelation", "block", "recompute"),
)


def main() -> int:
    """Returns the exit status."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    wheel, other = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        install = [other, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place / "site"), wheel]
        subprocess.run(install, check=True)
        tests = place / "tests"
        tests.mkdir()
        for path in (ROOT / "tests").glob("*.py"):  # helpers, and of the tests those chosen
            if not path.name.startswith("test_") or path.stem.removeprefix("test_") in FILES:
                shutil.copy(path, tests)
        env = os.environ | {"PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1"}
        subprocess.run([other, "-m", "acnet_kernels", "doctor"], cwd=place, env=env, check=True)
        command = [other, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
        return subprocess.run(command, cwd=place, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
