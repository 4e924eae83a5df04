"""MobileOneBlock: n copies of a k×k convolution, 1×1 and identity, each with its batch norm (arXiv 2206.04040)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .geometry import Geometry, IntOrPair, PaddingMode, Taps, as_int
from .rep import RepBlock, conv_bn
from .submodules import Layout, Slot


class MobileOneBlock(RepBlock):
    """A MobileOne layer: ReLU(Σ_b BN_b(W_b * x)).

    Its branches are `num_conv_branches` k×k convolutions, a 1×1 where k > 1, and the identity where shapes allow.
    Constructor, attribute and state-dict names are the original code's: rbr_conv.{i}.{conv,bn},
    rbr_scale.{conv,bn}, rbr_skip (a batch norm, or None), activation; folded: reparam_conv.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as nn.Conv2d; odd,
            and padded so that the 1×1 convolution reads its centre.
        inference_mode: build the folded form.
        num_conv_branches: n, 1 to 6.
        backend: how training steps are computed, as ACBlock's.
        device, dtype: of parameters and buffers.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it.
    """

    FUSED = "reparam_conv"

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
        inference_mode: bool = False,
        num_conv_branches: int = 1,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_conv_branches not in range(1, 7):
            raise ValueError(f"num_conv_branches must be 1 to 6, got {num_conv_branches!r}")
        geometry = Geometry.make(kernel_size, stride, padding, dilation, groups, padding_mode)
        channels = (
            as_int(in_channels, "in_channels must be an int"),
            as_int(out_channels, "out_channels must be an int"),
        )
        centre = Taps(geometry.kernel[0] // 2, geometry.kernel[1] // 2, 1, 1)
        slots = [
            Slot(
                f"conv.{i}",
                geometry.whole,
                ("rbr_conv", str(i), "conv"),
                ("rbr_conv", str(i), "bn"),
                f"rbr_conv.{i}",
            )
            for i in range(num_conv_branches)
        ]
        if geometry.kernel != (1, 1):
            slots.append(Slot("scale", centre, ("rbr_scale", "conv"), ("rbr_scale", "bn"), "rbr_scale"))
        has_skip = channels[0] == channels[1] and geometry.centre is not None
        if has_skip:
            slots.append(Slot("skip", centre, None, ("rbr_skip",)))
        self._lay_out(Layout.of(geometry, slots), channels, inference_mode, backend)
        factory = {"device": device, "dtype": dtype}
        self.activation = nn.ReLU()
        if inference_mode:
            self.reparam_conv = self._fused_conv(factory)
            return
        self.rbr_skip = nn.BatchNorm2d(channels[1], **factory) if has_skip else None  # type: ignore[arg-type]
        self.rbr_conv = nn.ModuleList(conv_bn(self._conv(i, factory)) for i in range(num_conv_branches))
        self.rbr_scale = conv_bn(self._conv(num_conv_branches, factory)) if geometry.kernel != (1, 1) else None

    def finish(self, out: Tensor) -> Tensor:
        """ReLU."""
        return self.activation(out)
