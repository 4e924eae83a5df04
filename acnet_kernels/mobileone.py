"""MobileOneBlock: n k×k convolutions, 1×1 and identity, each with its batch norm, summed (arXiv 2206.04040)."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from .activations import activation_after
from .geometry import Geometry, IntOrPair, PaddingMode
from .rep import RepBlock, conv_bn, usual_slots
from .squeeze_excite import SqueezeExcite


class MobileOneBlock(RepBlock):
    """A MobileOne layer: ReLU(Σ_b BN_b(W_b * x)).

    Its branches are `num_conv_branches` k×k convolutions, a 1×1 where k > 1, and the identity where shapes allow.
    Arguments, attributes and state-dict names are the original code's: rbr_conv.{i}.{conv,bn}, rbr_scale.{conv,bn},
    rbr_skip (a batch norm, or None), se, activation; folded: reparam_conv.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as nn.Conv2d, the
            kernel odd.
        inference_mode: build the folded form.
        use_se: squeeze-and-excitation between the sum and the ReLU.
        num_conv_branches: n, 1 to 6.
        backend, device, dtype: as ACBlock's.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it.
    """

    FUSED = "reparam_conv"

    def __init__(
        self,
        in_channels: SupportsIndex,
        out_channels: SupportsIndex,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: SupportsIndex = 1,
        padding_mode: PaddingMode = "zeros",
        inference_mode: bool = False,
        use_se: bool = False,
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
        copies = [("rbr_conv", str(i)) for i in range(num_conv_branches)]
        scale = None if geometry.kernel == (1, 1) else "rbr_scale"
        slots = usual_slots(geometry, copies, scale, "rbr_skip" if in_channels == out_channels else None)
        self._lay_out(geometry, in_channels, out_channels, slots, None, inference_mode, backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = self._layout.channels[1]
        self.se = SqueezeExcite(channels, ("reduce", "expand"), factory) if use_se else nn.Identity()
        self.activation = nn.ReLU()
        if inference_mode:
            self.reparam_conv = self._fused_conv(factory)
            return
        self.rbr_skip = nn.BatchNorm2d(channels, **factory) if slots[-1].name == "rbr_skip" else None
        self.rbr_conv = nn.ModuleList(conv_bn(self._conv(i, factory)) for i in range(num_conv_branches))
        self.rbr_scale = conv_bn(self._conv(num_conv_branches, factory)) if scale else None

    def finish(self, out: Tensor) -> Tensor:
        """ReLU, after squeeze-and-excitation where there is one."""
        return self.activation(self.se(out))

    def finishing(self) -> str | None:
        """The activation, where it is a known one and comes alone."""
        return activation_after(self._modules.get("se"), self._modules.get("activation"))
