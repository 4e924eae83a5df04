"""Our own ways to a convolution's gradients against the library's."""

import pytest
import torch
from oracle import rel
from steps import GEOMETRIES, check

from acnet_kernels import ACBlock
from acnet_kernels.backends import node
from acnet_kernels.block import taps_of
from acnet_kernels.geometry import Geometry, Placement
from acnet_kernels.steps import convolution, maps


@pytest.fixture
def columns(monkeypatch):
    """Columns' weight gradients by matrix products at any size; the list of what was computed so."""
    found = []

    def gradient(*args):
        found.append(convolution.column_weight_gradient(*args))
        return found[-1]

    monkeypatch.setattr(convolution, "LEAST_PIXELS", 0)
    monkeypatch.setattr(convolution, "LEAST_PRODUCT", 0)
    monkeypatch.setattr(maps, "column_weight_gradient", gradient)
    monkeypatch.setattr(node, "NODE", None)  # which has the library's alone
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_steps_with_columns_by_matrix_products(columns, geometry):
    b = ACBlock(4, 6, backend="branches", **geometry)
    check(b, torch.randn(3, 4, 13, 11).to(memory_format=torch.channels_last))
    g = b.geometry if b.geometry.padding_mode == "zeros" else b.geometry.explicit()
    plain = g.stride == (1, 1) and g.groups == 1 and not any(g.placement(b.taps["ver"]).edges)
    assert any(dw is not None for dw in columns) == plain


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_any_padding_and_dilation(columns, kernel, rows, padding, dilation):
    size = rows + 2 * padding - dilation * (kernel - 1)
    if size < 1:
        size, rows = 1, 1 + dilation * (kernel - 1) - 2 * padding
    x, dy = (torch.randn(2, c, h, 5).to(memory_format=torch.channels_last) for c, h in ((3, rows), (4, size)))
    place = Placement((kernel, 1), (0, 0, 0, 0), (padding, 0), (dilation, 1))
    got = convolution.column_weight_gradient(dy, x, place, (1, 1), 1)
    true = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), torch.zeros(4, 3, kernel, 1).double(), None, (1, 1), place.padding, place.dilation,
        False, (0, 0), 1, (False, True, False),
    )[1]  # fmt: skip
    assert got.shape == true.shape
    assert rel(got, true) < 1e-6


@pytest.mark.parametrize("least", [1, 16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_steps_with_input_gradients_added_within_convolutions(monkeypatch, geometry, least):
    added = []

    def add(*args):
        added.append(convolution.add_input_gradient(*args))
        return added[-1]

    for name, value in (("LEAST_MAP", 0), ("LEAST_MAPS_OF_KERNEL", 0), ("LEAST_OF_GROUP", least)):
        monkeypatch.setattr(convolution, name, value)
    monkeypatch.setattr(maps, "add_input_gradient", add)
    monkeypatch.setattr(node, "direct_pays", lambda *_: False)
    b = ACBlock(4, 6, backend="branches", **geometry)
    check(b, torch.randn(3, 4, 13, 11).to(memory_format=torch.channels_last))
    g = b.geometry if b.geometry.padding_mode == "zeros" else b.geometry.explicit()
    few = g.groups > 1 and least == 16
    if g.stride != (1, 1) or few or not convolution.accumulates():
        assert not any(added)
    elif not any(edge for taps in b.taps.values() for edge in g.placement(taps).edges):
        assert any(added)


def test_wide_kernels_small_maps_and_other_layouts_are_the_library():
    geometry, taps = Geometry.make(3, padding=1), taps_of(3)
    place, square = geometry.placement(taps["ver"]), geometry.placement(taps["square"])
    large, small = torch.randn(2, 64, 16, 16), torch.randn(2, 64, 4, 4)
    last = torch.channels_last
    args = (large.to(memory_format=last),) * 2
    assert convolution.column_weight_gradient(*args, place, (1, 1), 1) is not None
    assert convolution.column_weight_gradient(*args, square, (1, 1), 1) is None
    assert convolution.column_weight_gradient(large, large, place, (1, 1), 1) is None
    assert convolution.column_weight_gradient(*(small.to(memory_format=last),) * 2, place, (1, 1), 1) is None
