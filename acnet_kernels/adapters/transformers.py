"""transformers' blocks: TextNet, the RT-DETR family, EfficientLoFTR, PP-LCNetV3."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .adapter import Adapter, NotKnownError, Part, branch_in, branches_in, has, identity


class Transformers(Adapter):
    """What they hold their branches in."""

    containers: ClassVar[Mapping[str, frozenset[str]]] = {
        "*ConvNormLayer": frozenset({"conv", "norm", "activation"}),
        "*ConvLayer": frozenset({"convolution", "normalization", "activation"}),
    }


class TextNetRepConvLayer(Transformers):
    """ACNet's three branches, and a batch norm on x."""

    classes = ("TextNetRepConvLayer",)
    reads = frozenset(
        {
            "main_conv",
            "main_batch_norm",
            "vertical_conv",
            "vertical_batch_norm",
            "horizontal_conv",
            "horizontal_batch_norm",
            "rbr_identity",
            "activation_function",
        }
    )
    after = ("activation_function",)

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k, k×1, 1×k, identity."""
        for name in ("main", "vertical", "horizontal"):
            if has(block, f"{name}_conv"):
                yield Part(f"{name}_conv", f"{name}_batch_norm")
        if has(block, "rbr_identity"):
            yield identity("rbr_identity")


class DetrRepVggBlock(Transformers):
    """RT-DETR's, and of those that copy it: D-FINE, OmDet-Turbo, PP-DocLayout …: 3×3 and 1×1."""

    classes = ("*RepVggBlock",)
    reads = frozenset({"conv1", "conv2", "activation"})
    after = ("activation",)

    def branches(self, block: Any) -> Iterator[Part]:
        """3×3, 1×1."""
        yield branch_in(block, "conv1")
        yield branch_in(block, "conv2")


class SequentialRepVggBlock(Transformers):
    """RF-DETR's and LW-DETR's by that name: no branches at all."""

    classes = ("*RepVggBlock",)
    reads = frozenset({"conv1", "conv2"})

    def branches(self, block: Any) -> Iterator[Part]:
        """None."""
        raise NotKnownError("its two convolutions follow each other")


class EfficientLoFTRRepVGGBlock(Transformers):
    """3×3, 1×1 and identity."""

    classes = ("EfficientLoFTRRepVGGBlock",)
    reads = frozenset({"conv1", "conv2", "identity", "activation"})
    after = ("activation",)

    def branches(self, block: Any) -> Iterator[Part]:
        """3×3, 1×1, identity."""
        yield branch_in(block, "conv1")
        yield branch_in(block, "conv2")
        if has(block, "identity"):
            yield identity("identity")


class PPLCNetV3LearnableRepLayer(Transformers):
    """Several k×k, 1×1 and identity; a learnt scale and bias and an activation after the sum."""

    classes = ("PPLCNetV3LearnableRepLayer",)
    reads = frozenset({"identity", "conv_small_symmetric", "conv_symmetric", "lab", "stride", "act"})

    def branches(self, block: Any) -> Iterator[Part]:
        """k×k …, 1×1, identity."""
        yield from branches_in(block, "conv_symmetric")
        if has(block, "conv_small_symmetric"):
            yield branch_in(block, "conv_small_symmetric")
        if has(block, "identity"):
            yield identity("identity")

    def finish(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        """Scale, bias, and the activation where it has one."""
        out = block.lab(out)
        return out if block.stride == 2 else block.act(out)

    def fold_away(self, block: Any, conv: nn.Conv2d) -> nn.Module:
        """The convolution and what comes after."""
        rest = [("lab", block.lab)] if block.stride == 2 else [("lab", block.lab), ("act", block.act)]
        return nn.Sequential(OrderedDict([("conv", conv), *rest])).train(block.training)


ADAPTERS = (
    TextNetRepConvLayer(),
    DetrRepVggBlock(),
    SequentialRepVggBlock(),
    EfficientLoFTRRepVGGBlock(),
    PPLCNetV3LearnableRepLayer(),
)
