"""The CPU kernels for processors with less than this one: which it takes is chosen once a process.

One process each: half of what it takes goes into starting, and the cases of all kernels fit into one.
"""

import itertools
import os
import subprocess
import sys

import pytest
import test_bn_sum
import test_depthwise_epilogue
import test_direct
import test_epilogue
import torch
from test_epilogue import FOLLOWS, LAYOUTS

from acnet_kernels.backends import node
from acnet_kernels.ops import _extension


def of_every_kernel():
    """Each kernel in each layout and dtype."""
    torch.manual_seed(0)
    three = test_bn_sum.TOLERANCES, LAYOUTS, test_bn_sum.SHAPES
    for (i, dtype), (j, layout), (k, shape) in itertools.product(*map(enumerate, three)):
        test_bn_sum.check("operators", shape, dtype, layout, (3, 6)[(i + j + k) % 2])
    for layout in LAYOUTS:
        for dtype, narrow in ((torch.float32, torch.bfloat16), (torch.float64, None)):
            test_epilogue.test_the_operators(dtype, narrow, layout)
    test_epilogue.test_values_of_every_size()
    dtypes = itertools.cycle(test_depthwise_epilogue.DTYPES)
    for (activation, adds), dtype in zip(FOLLOWS, dtypes, strict=False):
        test_depthwise_epilogue.test_as_good_as_eager(activation, adds, "mobileone of stride 2", dtype, None)
        test_depthwise_epilogue.test_exact_in_float64(activation, adds, "mobileone", LAYOUTS[0])
    if node.NODE is None:
        return
    node.direct_pays = test_direct.everywhere
    for i, case in enumerate(test_direct.CASES):
        for dtype in (torch.float32, test_direct.DTYPES[1 + i % 2]):
            for layout in LAYOUTS:
                test_direct.test_as_good_as_eager(*case, layout, dtype)
    test_direct.test_other_kernels(5)


@pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ kernels: {_extension.WHY_MISSING}")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    code = "import test_instruction_sets; test_instruction_sets.of_every_kernel(); print('checked')"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr
