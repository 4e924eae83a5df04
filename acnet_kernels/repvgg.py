"""RepVGGBlock: k×k, 1×1 and identity, each with its batch norm, summed (arXiv 2101.03697)."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from .activations import activation_after
from .geometry import Geometry, IntOrPair, PaddingMode
from .rep import RepBlock, conv_bn, usual_slots
from .squeeze_excite import SqueezeExcite


class RepVGGBlock(RepBlock):
    """A RepVGG layer: ReLU(Σ_b BN_b(W_b * x)) of a k×k and a 1×1 convolution and, where shapes allow, the identity.

    Arguments, attributes and state-dict names are the original code's: rbr_dense.{conv,bn}, rbr_1x1.{conv,bn},
    rbr_identity (a batch norm, or None), se, nonlinearity; deployed: rbr_reparam.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as nn.Conv2d, the
            kernel odd.
        deploy: build the folded form.
        use_se: squeeze-and-excitation between the sum and the ReLU.
        backend, device, dtype: as ACBlock's.

    Raises:
        TypeError, ValueError: an argument out of range; the message names it.
    """

    FUSED = "rbr_reparam"

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
        deploy: bool = False,
        use_se: bool = False,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        geometry = Geometry.make(kernel_size, stride, padding, dilation, groups, padding_mode)
        slots = usual_slots(
            geometry, [("rbr_dense",)], "rbr_1x1", "rbr_identity" if in_channels == out_channels else None
        )
        self._lay_out(geometry, in_channels, out_channels, slots, None, deploy, backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = self._layout.channels[1]
        self.nonlinearity = nn.ReLU()
        self.se = SqueezeExcite(channels, ("down", "up"), factory) if use_se else nn.Identity()
        if deploy:
            self.rbr_reparam = self._fused_conv(factory)
            return
        self.rbr_identity = nn.BatchNorm2d(channels, **factory) if len(slots) > 2 else None
        self.rbr_dense, self.rbr_1x1 = (conv_bn(self._conv(i, factory)) for i in range(2))

    def finish(self, out: Tensor) -> Tensor:
        """ReLU, after squeeze-and-excitation where there is one."""
        return self.nonlinearity(self.se(out))

    def finishing(self) -> str | None:
        """The activation, where it is a known one and comes alone."""
        return activation_after(self._modules.get("se"), self._modules.get("nonlinearity"))
