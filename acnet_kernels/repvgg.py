"""RepVGGBlock: k×k, 1×1 and identity, each with its batch norm, summed (arXiv 2101.03697)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .geometry import Geometry, IntOrPair, PaddingMode, Taps, as_int
from .rep import RepBlock, conv_bn
from .submodules import Layout, Slot


class RepVGGBlock(RepBlock):
    """A RepVGG layer: ReLU(Σ_b BN_b(W_b * x)) of a k×k and a 1×1 convolution and, where shapes allow, the identity.

    Constructor, attribute and state-dict names are the original code's: rbr_dense.{conv,bn}, rbr_1x1.{conv,bn},
    rbr_identity (a batch norm, or None), nonlinearity; deployed: rbr_reparam.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as nn.Conv2d; odd,
            and padded so that the 1×1 convolution reads its centre.
        deploy: build the folded form.
        backend: how training steps are computed, as ACBlock's.
        device, dtype: of parameters and buffers.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it.
    """

    FUSED = "rbr_reparam"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        deploy: bool = False,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        geometry = Geometry.make(kernel_size, stride, padding, dilation, groups, padding_mode)
        channels = (
            as_int(in_channels, "in_channels must be an int"),
            as_int(out_channels, "out_channels must be an int"),
        )
        centre = Taps(geometry.kernel[0] // 2, geometry.kernel[1] // 2, 1, 1)
        slots = [
            Slot("dense", geometry.whole, ("rbr_dense", "conv"), ("rbr_dense", "bn"), "rbr_dense"),
            Slot("1x1", centre, ("rbr_1x1", "conv"), ("rbr_1x1", "bn"), "rbr_1x1"),
        ]
        has_identity = channels[0] == channels[1] and geometry.centre is not None
        if has_identity:
            slots.append(Slot("identity", centre, None, ("rbr_identity",)))
        self._lay_out(Layout.of(geometry, slots), channels, deploy, backend)
        factory = {"device": device, "dtype": dtype}
        self.nonlinearity = nn.ReLU()
        if deploy:
            self.rbr_reparam = self._fused_conv(factory)
            return
        self.rbr_identity = nn.BatchNorm2d(channels[1], **factory) if has_identity else None  # type: ignore[arg-type]
        self.rbr_dense = conv_bn(self._conv(0, factory))
        self.rbr_1x1 = conv_bn(self._conv(1, factory))

    def finish(self, out: Tensor) -> Tensor:
        """ReLU."""
        return self.nonlinearity(out)
