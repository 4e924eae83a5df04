"""Input gradients of convolutions, added to one that exists already."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

from ..geometry import Pair, Placement

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Turning a kernel round costs a pass over it: not where the map is hardly larger than the kernel.
LEAST_MAP = 4


@functools.cache
def _vendor_accumulates() -> bool:
    # oneDNN's convolution with a sum, which torch.compile uses; elsewhere than on x86-64 it may be a slow loop.
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
    return has_operator and platform.machine() in ("x86_64", "AMD64")


def add_input_gradient(
    dx: Tensor, dy: Tensor, weight: Tensor, place: Placement, stride: Pair, dilation: Pair, groups: int
) -> bool:
    """Adds the gradient of x in y = conv2d(place.apply(x), weight) to dx within the vendor's convolution.

    At stride 1 that gradient is a convolution of dy with the kernel turned round, and what a placement crops is
    padding of dy. It saves writing the gradient and the passes that would add it.

    Args:
        dx: N×C×H×W, dense; added to in place.
        dy: N×K×H'×W' of dx's dtype; weight: K×(C/groups)×rows×columns of that dtype too.

    Returns:
        Whether it did; dx is untouched where the vendor has no such convolution for the case.
    """
    left, right, top, bottom = place.edges
    fits = stride == (1, 1) and top == bottom and left == right
    if not (fits and dx.is_cpu and dx.dtype in _DTYPES and dx.numel() >= LEAST_MAP * weight.numel() > 0):
        return False
    if not (_vendor_accumulates() and torch._C._get_mkldnn_enabled()):
        return False
    kernel, cropped = place.kernel, (top, left)
    rows, columns = (d * (k - 1) - p - e for d, k, p, e in zip(dilation, kernel, place.padding, cropped, strict=True))
    if min(rows, columns) < 0:
        return False
    turned = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        dx, dy, turned, None, (rows, columns), (1, 1), dilation, groups, "add", 1.0, None, [], ""
    )
    return True
