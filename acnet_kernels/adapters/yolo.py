"""The YOLO repositories' blocks: v6's QARepVGGBlock, v7's RepConv, v9's and ultralytics' RepConv(N), v10's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from .adapter import Adapter, Part, branch_in, has, identity
from .original import RepVGGBlock


class QARepVGGBlock(RepVGGBlock):
    """YOLOv6's: the 1×1 convolution and x have no batch norm, the sum has one."""

    classes = ("QARepVGGBlock",)
    reads = RepVGGBlock.reads | {"bn"}
    total = "bn"
    idle = ("se",)
    after = ("nonlinearity",)

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k, 1×1, x."""
        yield branch_in(block, "rbr_dense")
        yield Part("rbr_1x1", "")
        if has(block, "rbr_identity"):
            yield identity(idle=("rbr_identity",))

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The original's folded form, which has a batch norm after the convolution still: this has none."""
        found = super().fold_away(block, conv)
        block.se, block.bn = nn.Identity(), nn.Identity()
        return found


class YoloV7RepConv(Adapter):
    """YOLOv7's: k×k, 1×1 and identity."""

    classes = ("RepConv",)
    reads = frozenset({"hasattr", "act", "rbr_reparam", "rbr_identity", "rbr_dense", "rbr_1x1"})
    after = ("act",)
    folded = "rbr_reparam"

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k, 1×1, identity."""
        yield branch_in(block, "rbr_dense")
        yield branch_in(block, "rbr_1x1")
        if has(block, "rbr_identity"):
            yield identity("rbr_identity")


class Yolo(Adapter):
    """v9's and ultralytics': their blocks are of Conv, and call forward_fuse in place of forward once folded."""

    containers: ClassVar[Mapping[str, frozenset[str]]] = {"Conv": frozenset({"conv", "bn", "act"})}
    after = ("act",)
    folded = "conv"

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The library's folded form."""
        found = super().fold_away(block, conv)
        block.forward = block.forward_fuse
        return found


class RepConv(Yolo):
    """3×3, 1×1, and a batch norm on x where asked for."""

    classes = ("RepConv", "RepConvN")
    reads = frozenset({"bn", "act", "conv1", "conv2"})

    def branches(self, block: Any) -> Iterator[Part]:
        """3×3, 1×1, identity."""
        yield branch_in(block, "conv1")
        yield branch_in(block, "conv2")
        if has(block, "bn"):
            yield identity("bn")


class RepVGGDW(Yolo):
    """YOLOv10's: depthwise 7×7 and 3×3."""

    classes = ("RepVGGDW",)
    reads = frozenset({"act", "conv", "conv1"})

    def branches(self, block: Any) -> Iterator[Part]:
        """7×7, 3×3."""
        yield branch_in(block, "conv")
        yield branch_in(block, "conv1")

    def is_folded(self, block: Any) -> bool:
        """Whether one convolution is left."""
        return not has(block, "conv1")


ADAPTERS = (QARepVGGBlock(), YoloV7RepConv(), RepConv(), RepVGGDW())
