"""timm's blocks: RepVGG, MobileOne, FastViT, RepViT, RepGhost, LCNetV2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..spec import Branch, Step
from ..submodules import Layout
from .adapter import Adapter, NotKnownError, Part, branch_in, branches_in, find, has, identity


class Timm(Adapter):
    """What all of them hold their branches in: ConvNormAct; repvit's ConvNorm is an nn.Sequential."""

    containers: ClassVar[Mapping[str, frozenset[str]]] = {
        "ConvNormAct": frozenset({"conv", "bn", "getattr", "aa"}),
    }


class RepVggBlock(Timm):
    """byobnet's: k×k, 1×1 and identity; its drop path is between them."""

    classes = ("RepVggBlock",)
    reads = frozenset({"reparam_conv", "identity", "conv_1x1", "conv_kxk", "drop_path", "attn", "act"})
    idle = ("drop_path",)
    after = ("attn", "act")
    folded = "reparam_conv"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k, 1×1, identity."""
        yield branch_in(block, "conv_kxk")
        yield branch_in(block, "conv_1x1")
        if has(block, "identity"):
            yield identity("identity")


class MobileOneBlock(Timm):
    """byobnet's: several k×k, 1×1 and identity; its drop path is between them."""

    classes = ("MobileOneBlock",)
    reads = frozenset({"reparam_conv", "identity", "conv_scale", "conv_kxk", "drop_path", "attn", "act"})
    idle = ("drop_path",)
    after = ("attn", "act")
    folded = "reparam_conv"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k …, 1×1, identity."""
        yield from branches_in(block, "conv_kxk")
        if has(block, "conv_scale"):
            yield branch_in(block, "conv_scale")
        if has(block, "identity"):
            yield identity("identity")


class FastVitMobileOneBlock(Timm):
    """fastvit's own MobileOneBlock, without drop path; one without a convolution is part of a RepMixer."""

    classes = ("MobileOneBlock",)
    reads = frozenset({"reparam_conv", "identity", "conv_scale", "conv_kxk", "se", "act"})
    after = ("se", "act")
    folded = "reparam_conv"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k …, 1×1, identity."""
        yield from mobile_one_branches(block)

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The library's folded form."""
        block.inference_mode = True
        return super().fold_away(block, conv)


def mobile_one_branches(block: Any, name: str = "") -> Iterator[Part]:
    """Those of fastvit's MobileOneBlock, or of the one that a block has by this name."""
    own, outer = (find(block, name), (name,)) if name else (block, ())
    dotted = f"{name}." if name else ""
    if has(own, "conv_kxk"):
        yield from branches_in(block, f"{dotted}conv_kxk", *outer)
    if has(own, "conv_scale"):
        yield branch_in(block, f"{dotted}conv_scale", *outer)
    if has(own, "identity"):
        yield identity(f"{dotted}identity", *outer)


class RepMixer(Timm):
    """fastvit's: x + γ·(MobileOneBlock(x) − BN(x)), all of it one step.

    Under autocast it multiplies and adds in float32, as γ is: there the step is what γ multiplies, of any dtype.
    """

    classes = ("RepMixer",)
    reads = frozenset({"reparam_conv", "layer_scale", "mixer", "norm"})
    containers: ClassVar[Mapping[str, frozenset[str]]] = {
        **Timm.containers,
        "MobileOneBlock": FastVitMobileOneBlock.reads,
        "LayerScale2d": frozenset({"gamma", "inplace", "mul_"}),
    }
    folded = "reparam_conv"

    def branches(self, block: Any) -> Iterator[Part]:
        """The mixer's, the norm's, x."""
        yield from mobile_one_branches(block, "mixer")
        yield identity("norm.identity", "norm", "layer_scale")

    def declines(self, layout: Layout, x: Tensor) -> str | None:
        """Nothing."""
        return None

    def adjust(self, block: Any, step: Step) -> Step:
        """The norm's branch subtracted; all of them scaled by γ, and x added, but under autocast."""
        *mixed, norm = step.branches
        if torch.is_autocast_enabled(step.kernel.device.type):
            return replace(step, branches=(*mixed, _scaled(norm, -1.0)))
        scale = block.layer_scale
        gamma = 1.0 if isinstance(scale, nn.Identity) else scale.gamma.flatten()
        branches = [_scaled(branch, gamma) for branch in mixed]
        return replace(step, branches=(*branches, _scaled(norm, -gamma), Branch(norm.taps, None, name="x")))

    def finish(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        """The sum; under autocast scaled and added to x."""
        return x + block.layer_scale(out) if torch.is_autocast_enabled(x.device.type) else out

    def parts_of(self, block: Any) -> set[str]:
        """All that it has."""
        return {"mixer", "norm", "layer_scale"}

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The library's folded form."""
        block.inference_mode = True
        return super().fold_away(block, conv)


def _scaled(branch: Branch, factor: Tensor | float) -> Branch:
    norm = branch.norm
    assert norm is not None
    assert norm.gamma is not None
    assert norm.beta is not None
    return branch._replace(norm=norm._replace(gamma=norm.gamma * factor, beta=norm.beta * factor))


class ReparamLargeKernelConv(Timm):
    """fastvit's: a large kernel and a small one."""

    classes = ("ReparamLargeKernelConv",)
    reads = frozenset({"reparam_conv", "large_conv", "small_conv", "se", "act"})
    after = ("se", "act")
    folded = "reparam_conv"

    def branches(self, block: Any) -> Iterator[Part]:
        """Large, small."""
        yield branch_in(block, "large_conv")
        if has(block, "small_conv"):
            yield branch_in(block, "small_conv")


class RepVggDw(Timm):
    """repvit's: a depthwise convolution with a batch norm, a 1×1 and x without; a batch norm after the sum.

    In its older form the 1×1 has a batch norm, and the sum none.
    """

    classes = ("RepVggDw",)
    reads = frozenset({"bn", "conv", "conv1"})
    total = "bn"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k, 1×1, x."""
        yield branch_in(block, "conv")
        yield Part("conv1", "") if isinstance(block.conv1, nn.Conv2d) else branch_in(block, "conv1")
        yield identity()


class RepGhostModule(Timm):
    """repghost's: a depthwise convolution and a batch norm, on what its first convolution makes of x."""

    classes = ("RepGhostModule",)
    reads = frozenset({"primary_conv", "cheap_operation", "zip", "fusion_conv", "fusion_bn", "relu"})
    after = ("relu",)

    def branches(self, block: Any) -> Iterator[Part]:
        """Depthwise, identity."""
        yield branch_in(block, "cheap_operation")
        for key in find(block, "fusion_bn")._modules:
            yield identity(f"fusion_bn.{key}", idle=(f"fusion_conv.{key}",))

    def declines(self, layout: Layout, x: Tensor) -> str | None:
        """Nothing: the branches' input is a convolution's output."""
        return None

    def prepare(self, block: Any, x: Tensor) -> Tensor:
        """What the first convolution makes of x."""
        return block.primary_conv(x)

    def is_folded(self, block: Any) -> bool:
        """Whether the depthwise convolution is one."""
        return isinstance(block.cheap_operation, nn.Conv2d)

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The library's folded form."""
        block.cheap_operation = conv
        for name in ("fusion_conv", "fusion_bn"):
            delattr(block, name)
            setattr(block, name, [])
        return block


class RepDepthwiseSeparable(Timm):
    """lcnetv2's: depthwise convolutions of several sizes, before a pointwise one."""

    classes = ("RepDepthwiseSeparable",)
    reads = frozenset({"dw_conv", "dw_act", "dw_conv_list", "enumerate", "se", "pw_conv", "use_shortcut"})
    after = ("dw_act", "se", "pw_conv")

    def is_folded(self, block: Any) -> bool:
        """Whether the depthwise convolution is one with a bias; without branches it is a ConvNormAct."""
        return isinstance(getattr(block, "dw_conv", None), nn.Conv2d)

    def branches(self, block: Any) -> Iterator[Part]:
        """The largest kernel first."""
        if not has(block, "dw_conv_list"):
            raise NotKnownError("its depthwise convolution is a single one")
        yield from branches_in(block, "dw_conv_list")

    def finish(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        """All that comes after, and the shortcut."""
        out = super().finish(block, out, x)
        return out + x if block.use_shortcut else out

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The library's folded form."""
        block.dw_conv = conv
        block.dw_conv_list = None
        return block


ADAPTERS = (
    RepVggBlock(),
    MobileOneBlock(),
    FastVitMobileOneBlock(),
    RepMixer(),
    ReparamLargeKernelConv(),
    RepVggDw(),
    RepGhostModule(),
    RepDepthwiseSeparable(),
)
