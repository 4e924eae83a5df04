"""Fast, exact re-parameterised blocks for PyTorch: ACNet's (ICCV 2019), RepVGG's, MobileOne's."""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and find_spec("torch") is None:  # `python -m acnet_kernels` comes by here
    sys.exit("python -m acnet_kernels: PyTorch is not installed; pip install torch")

from . import adapters, checkpoint
from .acceleration import accelerate, restore
from .autotune import tune
from .backends.planner import memory_saver
from .block import ACBlock
from .conversion import convert, fold, fuse
from .explanation import explain
from .functional import acblock
from .geometry import Geometry, Taps
from .mobileone import MobileOneBlock
from .repvgg import RepVGGBlock
from .spec import Branch, Norm

__version__ = "0.1.0"
__all__ = [
    "ACBlock",
    "Branch",
    "Geometry",
    "MobileOneBlock",
    "Norm",
    "RepVGGBlock",
    "Taps",
    "acblock",
    "accelerate",
    "adapters",
    "checkpoint",
    "convert",
    "explain",
    "fold",
    "fuse",
    "memory_saver",
    "restore",
    "tune",
]
