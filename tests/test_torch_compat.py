"""PyTorch's private names: all in one module, and a release without one is told of by name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from acnet_kernels._torch_compat import NAMES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "acnet_kernels"


def chain(node):
    """['torch', '_C', 'name'] of torch._C.name; [] of what begins with no name."""
    if isinstance(node, ast.Attribute):
        return [*base, node.attr] if (base := chain(node.value)) else []
    return [node.id] if isinstance(node, ast.Name) else []


def private_names(source):
    """The private names that the source takes from PyTorch, by import or as attributes of its modules."""
    modules, names = {"torch"}, set()
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.asname or "torch" for alias in node.names if alias.name.startswith("torch.")}
            names |= {alias.name for alias in node.names if alias.name.startswith("torch.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            modules |= {alias.asname or alias.name for alias in node.names}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    names |= {".".join(found) for found in map(chain, nodes) if found and found[0] in modules}
    names = {name for name in names if any(p.startswith("_") and not p.endswith("__") for p in name.split("."))}
    return names - {name for name in names if any(other.startswith(f"{name}.") for other in names)}


def test_all_are_in_one_module():
    found = {str(path): private_names(path.read_text()) for path in PACKAGE.rglob("*.py")}
    compat = found.pop(str(PACKAGE / "_torch_compat.py"))
    assert "torch.utils._pytree" in compat
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\nwith torch._C._Guard(): pass", {"torch._C._Guard"}),
        ("from torch._prims_common import suggest", {"torch._prims_common.suggest"}),
        ("import torch.nn.modules.module as m\nm._hooks.x", {"m._hooks.x"}),
        ("from torch.autograd import forward_ad\nforward_ad._level", {"forward_ad._level"}),
        ("from torch import Tensor\nTensor._make", {"Tensor._make"}),
        ("import torch, own\ntorch.__version__, own._x, torch.relu", set()),
    ],
)
def test_private_names_are_found(source, names):
    assert private_names(source) == names


# Each is missing in turn, in one process: importing torch takes longest, and the refusal comes before all else.
WITHOUT = """
import operator, sys, torch, torch._prims_common
for name in sys.argv[1:]:
    place, _, last = name.rpartition(".")
    owner = operator.attrgetter(place)(torch)
    value = getattr(owner, last)
    delattr(owner, last)
    try:
        import acnet_kernels
    except ImportError as error:
        print(f"ImportError: {error}")
    setattr(owner, last, value)
    for module in [module for module in sys.modules if module.startswith("acnet_kernels")]:
        del sys.modules[module]
"""


def test_a_torch_without_one_is_refused_by_name():
    names = [
        "_C._AutoDispatchBelowAutograd",
        "_C._functorch.peek_interpreter_stack",
        "autograd.forward_ad._current_level",
    ]
    command = [sys.executable, "-c", WITHOUT, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, said in zip(names, done.stdout.splitlines(), strict=True):
        assert said.startswith("ImportError: torch ")
        assert f"has no torch.{name}, which acnet_kernels needs ({NAMES[name]})" in said


def test_the_documentation_has_every_name():
    page = (ROOT / "docs" / "torch.md").read_text()
    assert re.findall(r"^\| `torch\.(.+?)` \| (.+?) \|$", page, re.MULTILINE) == list(NAMES.items())
