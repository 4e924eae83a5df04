"""Who computes each convolution of a step, the library or Triton; backends/phases.py chooses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ops._extension import TRITON as INSTALLED

LIBRARY, TRITON = "library", "triton"
DEVICE = "cuda"  # what the kernels are for


class Phases(NamedTuple):
    """What runs each phase: LIBRARY or TRITON."""

    forward: str
    dgrad: str
    wgrad: str


ALL_LIBRARY, ALL_TRITON = Phases(LIBRARY, LIBRARY, LIBRARY), Phases(TRITON, TRITON, TRITON)


def on_device(x: Tensor) -> bool:
    """Whether Triton's kernels are for where x is."""
    return x.device.type == DEVICE and INSTALLED
