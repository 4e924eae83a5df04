"""The benchmark's list of layers, and their names in the CSVs."""

import pytest
import torch

from acnet_kernels import ACBlock
from benchmarks import shapes
from benchmarks.shapes import Shape


@pytest.mark.parametrize("shape", [*shapes.CPU, *shapes.CUDA], ids=str)
def test_a_shape_is_its_string(shape):
    assert Shape.parse(str(shape)) == shape


def test_marks_come_in_one_order_and_defaults_are_silent():
    assert str(Shape("", 1, 32, 64, 5, 7)) == "1x32x5x7->64"
    full = Shape("", 1, 32, 64, 5, 7, kernel=5, stride=2, groups=32, dilation=3)
    assert str(full) == "1x32x5x7->64 k5 /2 g32 d3"
    assert Shape.parse(str(full)) == full


@pytest.mark.parametrize(
    "text", ["", "1x2x3->4", "1x2x3x4->5 /2 k5", "1x2x3x4->5 k5 ", "1x2x3x4->5k5", "ax2x3x4->5"]
)
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ValueError, match="shape must be like"):
        Shape.parse(text)


@pytest.mark.parametrize("name", ["tiny", "faceboxes", "dilated", "resnext grouped"])
def test_the_block_has_the_shape_it_says(name):
    small = shapes.select([name], shapes.CPU)[0].with_batch(1)
    x, grad = small.tensors(torch.float32)
    block = ACBlock(
        small.channels, small.out_channels, small.kernel, small.stride, small.padding, small.dilation, small.groups
    )
    out = block(x)
    assert out.shape == grad.shape == small.out_shape
    taps = sum(conv.weight[0].numel() for conv in block.convs().values())
    assert small.useful_flops == 2 * out.numel() * taps


def test_the_list_names_each_layer_once():
    for group in (shapes.CPU, shapes.CUDA):
        assert len({s.name for s in group}) == len({str(s) for s in group}) == len(group)


def test_select():
    assert shapes.select(["targets"], shapes.CPU) == list(shapes.TARGETS)
    assert [s.name for s in shapes.select(["yolo", "tiny", "yolo 40"], shapes.CPU)] == [
        "yolo 80²",
        "yolo 40²",
        "tiny",
    ]
    listed = shapes.select(["8x16x8x8->16", "2x3x4x5->6 k5"], shapes.CPU)
    assert listed[0].name == "tiny"
    assert str(listed[1]) == "2x3x4x5->6 k5"
    with pytest.raises(ValueError, match="got 'resnet57'"):
        shapes.select(["resnet57"], shapes.CPU)
