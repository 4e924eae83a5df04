"""Blocks with the class and attribute names of repositories that are on no package index, or under other licences.

What they compute is what their papers say; the code is this project's.
"""

from __future__ import annotations

from torch import Tensor, nn


def conv_bn(*args: int, names: tuple[str, str] = ("conv", "bn"), **options: object) -> nn.Sequential:
    pair = nn.Sequential()
    pair.add_module(names[0], nn.Conv2d(*args, bias=False, **options))
    pair.add_module(names[1], nn.BatchNorm2d(args[1]))
    return pair


class ACBlock(nn.Module):
    """DingXiaoH/ACNet's, which slices the lines' input where the padding is small."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1):
        super().__init__()
        self.deploy = False
        half = kernel // 2
        self.crop = max(half - padding, 0)
        extra = max(padding - half, 0)
        for name, size, pads in (
            ("square", (kernel, kernel), (padding, padding)),
            ("ver", (kernel, 1), (padding, extra)),
            ("hor", (1, kernel), (extra, padding)),
        ):
            conv = nn.Conv2d(inputs, outputs, size, stride, pads, groups=groups, bias=False)
            setattr(self, f"{name}_conv", conv)
            setattr(self, f"{name}_bn", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            return self.fused_conv(x)
        for_ver, for_hor = x, x
        if self.crop > 0:
            for_ver, for_hor = x[:, :, :, self.crop : -self.crop], x[:, :, self.crop : -self.crop, :]
        square = self.square_bn(self.square_conv(x))
        return square + self.ver_bn(self.ver_conv(for_ver)) + self.hor_bn(self.hor_conv(for_hor))


class CropLayer(nn.Module):
    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.rows_to_crop, self.cols_to_crop = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        rows = slice(self.rows_to_crop, x.shape[2] - self.rows_to_crop)
        return x[:, :, rows, self.cols_to_crop : x.shape[3] - self.cols_to_crop]


def acblock_with_layers(*args: int, **options: int) -> nn.Module:
    """The earlier ACBlock, whose lines are cropped by layers; its class's name is the same."""
    block = ACBlock(*args, **options)
    crop = block.__dict__.pop("crop")
    block.ver_conv_crop_layer = CropLayer(0, crop) if crop else nn.Identity()
    block.hor_conv_crop_layer = CropLayer(crop, 0) if crop else nn.Identity()
    block.__class__ = _Earlier
    return block


class _Earlier(ACBlock):
    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            return self.fused_conv(x)
        square = self.square_bn(self.square_conv(x))
        ver = self.ver_bn(self.ver_conv(self.ver_conv_crop_layer(x)))
        return square + ver + self.hor_bn(self.hor_conv(self.hor_conv_crop_layer(x)))


_Earlier.__name__ = "ACBlock"


class RepVGGBlock(nn.Module):
    """DingXiaoH/RepVGG's and YOLOv6's."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1
    ):
        super().__init__()
        self.deploy = False
        pad = dilation * (kernel // 2)
        self.nonlinearity, self.se = nn.ReLU(), nn.Identity()
        same = inputs == outputs and stride == 1
        self.rbr_identity = nn.BatchNorm2d(inputs) if same else None
        self.rbr_dense = conv_bn(inputs, outputs, kernel, stride, pad, dilation, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, 0, 1, groups)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(x)))
        skip = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.se(self.rbr_dense(x) + self.rbr_1x1(x) + skip))


class QARepVGGBlock(RepVGGBlock):
    """YOLOv6's: x and the 1×1 have no batch norm, the sum has one."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups)
        self.bn = nn.BatchNorm2d(outputs)
        self.rbr_1x1 = nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)
        self.rbr_identity = nn.Identity() if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.bn(self.se(self.rbr_reparam(x))))
        skip = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.bn(self.se(self.rbr_dense(x) + self.rbr_1x1(x) + skip)))


class MobileOneBlock(nn.Module):
    """apple/ml-mobileone's."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, copies: int = 1):
        super().__init__()
        self.inference_mode, self.num_conv_branches = False, copies
        self.se, self.activation = nn.Identity(), nn.ReLU()
        self.rbr_skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        pairs = (conv_bn(inputs, outputs, kernel, stride, kernel // 2, 1, groups) for _ in range(copies))
        self.rbr_conv = nn.ModuleList(pairs)
        self.rbr_scale = conv_bn(inputs, outputs, 1, stride, 0, 1, groups) if kernel > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.inference_mode:
            return self.activation(self.se(self.reparam_conv(x)))
        skip = 0 if self.rbr_skip is None else self.rbr_skip(x)
        out = skip + (0 if self.rbr_scale is None else self.rbr_scale(x))
        for i in range(self.num_conv_branches):
            out = out + self.rbr_conv[i](x)
        return self.activation(self.se(out))


class V7(nn.Module):
    """YOLOv7's RepConv."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1):
        super().__init__()
        self.act = nn.SiLU()
        named = {"names": ("0", "1")}
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = conv_bn(inputs, outputs, kernel, stride, kernel // 2, 1, groups, **named)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, 0, 1, groups, **named)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.act(self.rbr_reparam(x))
        skip = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.act(self.rbr_dense(x) + self.rbr_1x1(x) + skip)


V7.__name__ = "RepConv"


class Conv(nn.Module):
    """What the YOLOs' later blocks are made of."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = False
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class RepConv(nn.Module):
    """ultralytics', and YOLOv9's RepConvN, which never has a batch norm on x."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, bn: bool = False, act: bool = False
    ):
        super().__init__()
        self.act = nn.SiLU()
        self.bn = nn.BatchNorm2d(inputs) if bn else None
        self.conv1 = Conv(inputs, outputs, 3, stride, groups, act)
        self.conv2 = Conv(inputs, outputs, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + skip)

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class RepVGGDW(nn.Module):
    """YOLOv10's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.conv1 = Conv(channels, channels, 7, 1, channels), Conv(channels, channels, 3, 1, channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + self.conv1(x))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Halved(nn.Module):
    """Does something, in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5
