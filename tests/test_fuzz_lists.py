"""Random lists of branches, dense and depthwise, through every backend: equivalence or the documented error.

1 to 8 branches, the identity among them, with a batch norm each, none, some, or one after the sum, in every dtype
and layout; judged as test_fuzz.py judges ACNet's blocks. 300 cases of tiny shapes; HYPOTHESIS_CASES=N asks for N,
with fresh randomness in every run.
"""

import os

import pytest
import test_fuzz
import torch
from hypothesis import event
from hypothesis import strategies as st
from test_branch_lists import Block
from torch import nn

from acnet_kernels import Geometry, Taps
from acnet_kernels.backends import planner
from acnet_kernels.functional import describe

CASES = int(os.environ.get("HYPOTHESIS_CASES", 300))


class Drawn(Block):
    """A block of any geometry, channels and branches (kind, taps, whether it has a batch norm)."""

    def __init__(self, geometry, channels, kinds, total, bias, backend) -> None:
        nn.Module.__init__(self)
        self.geometry, self.kinds, self.backend = geometry, kinds, backend
        self.in_channels, self.out_channels = channels
        thin = self.in_channels // geometry.groups
        self.convs = nn.ModuleList()
        for kind, taps, _ in kinds:
            conv = nn.Identity()
            if kind == "conv":
                conv = nn.Conv2d(thin, self.out_channels, (taps.rows, taps.columns), bias=bias)
            self.convs.append(conv)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels[1]) if normed else nn.Identity() for *_, normed in kinds)
        self.total = nn.BatchNorm2d(channels[1]) if total else None


def taps(draw, kernel):
    """Taps of a kernel, with gaps or without."""
    step = draw(st.sampled_from([1, 1, 2]))
    rows, columns = (draw(st.integers(1, (k - 1) // step + 1)) for k in kernel)
    row, column = (
        draw(st.integers(0, k - 1 - (n - 1) * step)) for k, n in zip(kernel, (rows, columns), strict=True)
    )
    return Taps(row, column, rows, columns, step)


@st.composite
def blocks(draw):
    kernel = draw(st.one_of(st.just((3, 3)), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.just((7, 7))))
    depthwise = draw(st.booleans())
    groups = draw(st.integers(1, 5) if depthwise else st.integers(1, 2))
    inputs = groups if depthwise else groups * draw(st.integers(1, 3))
    outputs = inputs if draw(st.booleans()) else groups * draw(st.integers(1, 3))
    same = tuple(k // 2 for k in kernel)
    geometry = Geometry.make(
        kernel,
        draw(st.sampled_from([1, 1, 1, 2, (1, 2), 3])),
        draw(st.one_of(st.just(same), st.just(same), st.integers(0, 3))),
        draw(st.sampled_from([1, 1, 2])),
        groups,
        draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])),
    )
    normed = draw(st.sampled_from(["all", "all", "all", "none", "some"]))
    passes = inputs == outputs and geometry.centre is not None
    kinds = []
    for i in range(draw(st.integers(1, 8))):
        own = normed == "all" or (normed == "some" and draw(st.booleans()))
        if i and passes and draw(st.sampled_from([False, False, True])):
            kinds.append(("identity", None, own))
        else:
            kinds.append(("conv", taps(draw, kernel), own))
    total = normed == "none" or (normed == "some" and draw(st.booleans()))
    backend = draw(st.sampled_from((*planner.CHOICES, "moments", "recompute")))
    return Drawn(geometry, (inputs, outputs), kinds, total, draw(st.booleans()), backend)


def without_biases(block):
    """Backends leave out what a batch norm takes away again, and a level moves where half precision rounds a map.

    Where its spread is less than a last place, that decides whether it has a variance at all: luck, and no error.
    """
    with torch.no_grad():
        for conv in test_fuzz.convolutions(block):
            if conv.bias is not None:
                conv.bias.zero_()


def check(data):
    """One case: the block through its backend against its modules, or the same refusal by both."""
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    block = data.draw(blocks())
    mode = data.draw(st.sampled_from(("train", "train", "train", "eval", "one frozen norm", "momentum=None")))
    x = data.draw(test_fuzz.inputs(block.in_channels))
    if test_fuzz.library_reads_garbage(block, x):
        event("nn.Conv2d itself is wrong")
        return
    _, error = test_fuzz.attempt(lambda: block.geometry.pad_input(x))
    if error is not None:
        event("the image is too small for its padding")  # which a branch without border taps needs not
        return
    block = test_fuzz.prepare(block, mode, x.dtype)
    if x.dtype.itemsize == 2:
        without_biases(block)
    if test_fuzz.compare(block, x):
        choice = planner.choose(describe(x, block.step()), block.backend)
        event(f"compared: {mode}, {choice.backend.NAME}{', depthwise' * (block.geometry.groups == x.shape[1])}")


@pytest.mark.slow
def test_fuzz_of_lists():
    test_fuzz.fuzz(CASES, fresh="HYPOTHESIS_CASES" in os.environ, check=check)
