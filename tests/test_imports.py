"""What `import acnet_kernels` brings with it: nothing slow that it does not need."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLOW = ("torch._dynamo", "torch._inductor", "sympy", "triton", "torchvision", "matplotlib", "numpy", "PIL")

IMPORTED = """
import sys
import torch
before = set(sys.modules)
{code}
print(*(name for name in {slow} if name in sys.modules and name not in before))
"""

STEP = """
import acnet_kernels as ak
block = ak.ACBlock(3, 4, 3, padding=1)
block(torch.randn(2, 3, 5, 5)).sum().backward()
block.eval()(torch.randn(2, 3, 5, 5))
ak.fuse(ak.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))).eval())
"""


@pytest.mark.parametrize(
    "code", ["import acnet_kernels", "import acnet_kernels.paper.models, acnet_kernels.export", STEP]
)
def test_neither_the_package_nor_a_step_imports_what_is_slow(code):
    code = IMPORTED.format(code=code, slow=SLOW)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
