"""What `import acnet_kernels` brings with it: nothing slow that it does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "acnet_kernels"
SLOW = ("torch._dynamo", "torch._inductor", "sympy", "triton", "torchvision", "matplotlib", "numpy", "PIL")

# What each of the arguments, run one after the other, has imported since torch, a line each.
IMPORTED = """
import sys
import torch
slow, *codes = sys.argv[1:]
before = set(sys.modules)
for code in codes:
    exec(code)
    print(*(name for name in slow.split() if name in sys.modules and name not in before))
"""

STEP = """
import acnet_kernels as ak
block = ak.ACBlock(3, 4, 3, padding=1)
block(torch.randn(2, 3, 5, 5)).sum().backward()
block.eval()(torch.randn(2, 3, 5, 5))
ak.fuse(ak.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))).eval())
"""


def test_neither_the_package_nor_a_step_imports_what_is_slow():
    codes = ["import acnet_kernels", "import acnet_kernels.paper.models, acnet_kernels.export", STEP]
    command = [sys.executable, "-c", IMPORTED, " ".join(SLOW), *codes]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for code, found in zip(codes, result.stdout.splitlines(), strict=True):
        # convert() makes blocks on the meta device, for which torch 2.10 itself needs sympy.
        own = {"sympy"} if "convert" in code and torch.__version__ < "2.11" else set()
        assert set(found.split()) <= own, code


def test_the_core_runs_without_the_papers_application():
    foreign = "\nassert not [m for m in sys.modules if m.startswith('acnet_kernels.paper')]\n"
    code = f"import sys, torch\n{STEP}{foreign}from acnet_kernels import cli; cli.main(['doctor']){foreign}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def imported(path: Path) -> set[str]:
    """The absolute names of what a file of the package imports anywhere: modules, and what it takes from them."""
    package = ["acnet_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def test_no_module_of_the_core_imports_the_papers_application_or_numpy():
    core = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "paper" not in path.parents]
    assert PACKAGE / "block.py" in core
    found = {str(path): sorted(name for name in imported(path) if is_foreign(name)) for path in core}
    assert {name: foreign for name, foreign in found.items() if foreign} == {}
    # The same eyes see both where they are.
    assert any(map(is_foreign, imported(PACKAGE / "paper/training/loop.py")))
    assert is_foreign("acnet_kernels.paper.models")


def is_foreign(name: str) -> bool:
    """Whether the core must not import what has this name."""
    return name.partition(".")[0] == "numpy" or f"{name}.".startswith("acnet_kernels.paper.")
