"""Shows that the extension built here works in another environment: another torch, another CPython.

    python tools/check_abi.py /path/to/other/python

Copies the package with the built library, nothing else, into an empty directory, and runs the fusion tests there
with the other interpreter, which needs torch >= 2.10 and pytest. Prints both sides' versions; exits with pytest's
status.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = "import sys, torch; print('torch', torch.__version__, 'CPython', sys.version.split()[0])"
LOADED = "from acnet_kernels.ops import _extension; assert _extension.MISSING is None, _extension.MISSING"


def main() -> int:
    """Returns the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    other = sys.argv[1]
    library = ROOT / "acnet_kernels" / "_C.abi3.so"
    if not library.exists():
        print(f"{library} is not built: python setup.py build_ext --inplace", file=sys.stderr)
        return 2
    for role, python in (("built against", sys.executable), ("loaded into", other)):
        versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
        print(f"{role}: {versions.stdout.strip()}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(ROOT / "acnet_kernels", Path(directory) / "acnet_kernels")
        tests = Path(directory) / "tests"
        tests.mkdir()
        for name in ("test_fusion.py", "fusion_cases.py"):
            shutil.copy(ROOT / "tests" / name, tests)
        subprocess.run([other, "-c", LOADED], cwd=directory, check=True)
        command = [other, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
        return subprocess.run(command, cwd=directory, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
