"""Fast, exact asymmetric convolution blocks (ACNet, ICCV 2019) for PyTorch."""

from .block import ACBlock
from .functional import acblock
from .geometry import Geometry
from .spec import Branch, Norm

__version__ = "0.1.0"
__all__ = ["ACBlock", "Branch", "Geometry", "Norm", "acblock"]
