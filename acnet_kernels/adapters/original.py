"""The original repositories' blocks, and those of copies that keep their names: ACNet, RepVGG, MobileOne."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from .adapter import Adapter, NotKnownError, Part, branch_in, branches_in, find, has, identity


class ACBlock(Adapter):
    """ACNet's: k×k, k×1 and 1×k; with less padding than half its kernel it crops what the lines see."""

    classes = ("ACBlock",)
    reads = frozenset(
        {
            "deploy",
            "fused_conv",
            "square_conv",
            "square_bn",
            "crop",
            "ver_conv",
            "ver_bn",
            "hor_conv",
            "hor_bn",
        }
    )
    folded = "fused_conv"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k, 1×k, k×1."""
        for name in ("square", "hor", "ver"):
            yield Part(f"{name}_conv", f"{name}_bn")

    def crop(self, block: Any) -> int:
        """The block's own."""
        return block.crop

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The original's folded form."""
        block.deploy = True
        return super().fold_away(block, conv)


class CropLayerACBlock(ACBlock):
    """The original's earlier version, which crops by a layer."""

    reads = ACBlock.reads - {"crop"} | {"ver_conv_crop_layer", "hor_conv_crop_layer"}

    def crop(self, block: Any) -> int:
        """That of both layers: of k×1's columns and of 1×k's rows."""
        crops = set()
        for name, across in (("ver_conv_crop_layer", "cols_to_crop"), ("hor_conv_crop_layer", "rows_to_crop")):
            layer = find(block, name)
            along = ({"cols_to_crop", "rows_to_crop"} - {across}).pop()
            if getattr(layer, along, 0) != 0:
                raise NotKnownError(f"{name} crops along its line")
            crops.add(getattr(layer, across, 0))
        if len(crops) > 1:
            raise NotKnownError("its two lines are cropped by different widths")
        return crops.pop()

    def parts_of(self, block: Any) -> set[str]:
        """The layers that crop too."""
        return super().parts_of(block) | {"ver_conv_crop_layer", "hor_conv_crop_layer"}


class RepVGGBlock(Adapter):
    """RepVGG's, and YOLOv6's: k×k, 1×1 and identity."""

    classes: ClassVar[tuple[str, ...]] = ("RepVGGBlock",)
    reads = frozenset(
        {"hasattr", "nonlinearity", "se", "rbr_reparam", "rbr_identity", "rbr_dense", "rbr_1x1"},
    )
    after: ClassVar[tuple[str, ...]] = ("se", "nonlinearity")
    folded = "rbr_reparam"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k, 1×1, identity."""
        yield branch_in(block, "rbr_dense")
        yield branch_in(block, "rbr_1x1")
        if has(block, "rbr_identity"):
            yield identity("rbr_identity")

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The original's folded form."""
        block.deploy = True
        return super().fold_away(block, conv)


class MobileOneBlock(Adapter):
    """MobileOne's: several k×k, 1×1 and identity."""

    classes = ("MobileOneBlock",)
    reads = frozenset(
        {
            "inference_mode",
            "activation",
            "se",
            "reparam_conv",
            "rbr_skip",
            "rbr_scale",
            "range",
            "num_conv_branches",
            "rbr_conv",
        }
    )
    after = ("se", "activation")
    folded = "reparam_conv"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k …, 1×1, identity."""
        if len(find(block, "rbr_conv")._modules) != block.num_conv_branches:
            raise NotKnownError(f"num_conv_branches={block.num_conv_branches} is not the length of rbr_conv")
        yield from branches_in(block, "rbr_conv")
        if has(block, "rbr_scale"):
            yield branch_in(block, "rbr_scale")
        if has(block, "rbr_skip"):
            yield identity("rbr_skip")

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The original's folded form."""
        block.inference_mode = True
        return super().fold_away(block, conv)


ADAPTERS = (ACBlock(), CropLayerACBlock(), RepVGGBlock(), MobileOneBlock())
