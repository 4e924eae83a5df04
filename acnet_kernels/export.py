"""How well a network's convolutions take int8 weights: the report to read before quantising a folded network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .acceleration import Accelerated, HostBlock, seen
from .rep import RepBlock


@dataclass(frozen=True)
class WeightRange:
    """One convolution's weights, in the terms that decide what int8 costs.

    Attributes:
        name: the module's name in the network.
        peak: max |w| of the tensor, the range of one scale for all.
        spread: largest over smallest max |w| of the output channels; what one scale for all cannot serve.
        crest: median over output channels of max |w| / rms(w); what no scale of a channel's own can serve.
        sqnr_tensor, sqnr_channel: signal to rounding noise in dB with symmetric int8 weights, one scale a
            tensor, and one a channel. 6 dB are one bit.
    """

    name: str
    peak: float
    spread: float
    crest: float
    sqnr_tensor: float
    sqnr_channel: float


def weight_ranges(model: nn.Module) -> list[WeightRange]:
    """A WeightRange for every nn.Conv2d of model, in order; give it folded networks (`fuse`, fuse_conv_bn_eval).

    Raises:
        ValueError: a block is not folded, so the weights it will deploy with do not exist yet.
    """
    found = []
    for name, module in model.named_modules():
        block = seen(module) if isinstance(module, Accelerated) else module
        if isinstance(block, (RepBlock, HostBlock)) and not block.deploy:
            raise ValueError(f"block {name or '(model)'} is not folded: call fuse(model) first")
        if isinstance(module, nn.Conv2d):
            found.append(_range(name, module.weight.detach().double().flatten(1)))
    return found


def quantise(weight: Tensor, scale: Tensor, levels: int = 127) -> Tensor:
    """weight rounded to steps of scale (broadcast), symmetric, ±levels (127 is int8), in weight's dtype."""
    return (weight / scale).round().clamp(-levels, levels) * scale


def _range(name: str, rows: Tensor) -> WeightRange:
    tiny = torch.finfo(rows.dtype).tiny
    peaks = rows.abs().amax(1, keepdim=True).clamp_min(tiny)
    rms = rows.square().mean(1, keepdim=True).sqrt().clamp_min(tiny)

    def sqnr(scale: Tensor) -> float:
        noise = (quantise(rows, scale) - rows).square().sum().clamp_min(tiny)
        return float(10 * torch.log10(rows.square().sum().clamp_min(tiny) / noise))

    return WeightRange(
        name=name,
        peak=float(peaks.max()),
        spread=float(peaks.max() / peaks.min()),
        crest=float((peaks / rms).median()),
        sqnr_tensor=sqnr(peaks.max() / 127),
        sqnr_channel=sqnr(peaks / 127),
    )
