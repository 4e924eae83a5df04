"""Folded networks in other formats: ONNX under onnxruntime, TorchScript, torch.export; and their int8 ranges."""

import collections
import copy
import warnings

import pytest
import torch
from oracle import rel, scramble
from toolbox import load_tool
from torch import nn

from acnet_kernels import ACBlock, fuse
from acnet_kernels.export import quantise, weight_ranges


class Net(nn.Module):
    """Blocks of several geometries, one with a residual around it, all folded into plain convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = ACBlock(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            ACBlock(8, 8, 5, padding=2, groups=2), nn.ReLU(), ACBlock(8, 8, 3, padding=2, dilation=2)
        )
        self.down = ACBlock(8, 16, 3, stride=2, padding=1, norm="sum")
        self.head = ACBlock(16, 4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.body(x)
        return self.head(self.down(x).relu())


CONVOLUTIONS = 5


@pytest.fixture
def net():
    return scramble(Net()).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx(net, dtype, tmp_path):
    onnx, onnxruntime = (pytest.importorskip(name, reason="extra `export`") for name in ("onnx", "onnxruntime"))
    pytest.importorskip("onnxscript", reason="torch.onnx needs it: extra `export`")
    folded = fuse(net).to(dtype)
    path = tmp_path / "net.onnx"
    x = torch.randn(2, 3, 15, 13, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            folded,
            (x,),
            path,
            dynamo=True,
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            input_names=["x"],
            verbose=False,
        )
    ops = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert ops == {"Conv": CONVOLUTIONS, "Relu": 3, "Add": 1}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 2, 7):
        x = torch.randn(n, 3, 15, 13, dtype=dtype)
        (got,) = session.run(None, {"x": x.numpy()})
        want = copy.deepcopy(net).double()(x.double())
        assert rel(torch.from_numpy(got), want) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_torchscript_trace_has_convolutions_alone(net):
    x = torch.randn(2, 3, 15, 13)
    folded = fuse(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out, and still in use
        traced = torch.jit.trace(folded, x)
        unfolded = torch.jit.trace(net, x)
    kinds = collections.Counter(node.kind() for node in traced.inlined_graph.nodes())
    assert kinds["aten::_convolution"] == CONVOLUTIONS
    assert not any("norm" in kind for kind in kinds)
    for n in (1, 7):
        x = torch.randn(n, 3, 15, 13)
        assert rel(traced(x), folded(x)) < 1e-6
        assert rel(unfolded(x), net(x)) < 1e-6


def test_torch_export_of_a_folded_network(net):
    folded = fuse(net)
    program = torch.export.export(
        folded, (torch.randn(2, 3, 15, 13),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    targets = collections.Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert targets == {"aten.conv2d.default": CONVOLUTIONS, "aten.relu.default": 3, "aten.add.Tensor": 1}
    x = torch.randn(7, 3, 15, 13)
    assert rel(program.module()(x), net(x)) < 1e-5


def test_weight_ranges():
    conv = nn.Conv2d(2, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[3.0, 4.0], [0.1, 0.0]])[:, :, None, None]
    (found,) = weight_ranges(nn.Sequential(conv))
    assert (found.name, found.peak) == ("0", 4.0)
    assert found.spread == pytest.approx(40)
    assert found.crest == pytest.approx(4 / 12.5**0.5)  # torch's median of two is the lower
    # steps of 4/127: 3 → 95 steps, 0.1 → 3 steps; errors 0.25 and 0.175 steps
    step = 4 / 127
    noise = (95 * step - 3) ** 2 + (3 * step - 0.1) ** 2
    assert found.sqnr_tensor == pytest.approx(10 * torch.tensor(25.01 / noise).log10().item(), rel=1e-5)
    noise = (95 * step - 3) ** 2  # with a scale of its own the second channel is exact
    assert found.sqnr_channel == pytest.approx(10 * torch.tensor(25.01 / noise).log10().item(), rel=1e-5)
    got = quantise(torch.tensor([300.0, -300.0, 0.6]), torch.tensor(1.0))
    assert got.tolist() == [127.0, -127.0, 1.0]


def test_weight_ranges_ask_for_a_folded_network(net):
    with pytest.raises(ValueError, match=r"block stem is not folded: call fuse"):
        weight_ranges(net)
    assert [r.name for r in weight_ranges(fuse(net))] == [
        "stem",
        "body.0",
        "body.2",
        "down",
        "head",
    ]


@pytest.mark.slow
def test_folded_kernels_take_int8_worse_than_a_plain_networks():
    pytest.importorskip("sklearn", reason="it has the digits: extra `demo`")
    report = load_tool("int8_report")
    found = report.measure(seed=0, epochs=3)
    inner = {
        network: ranges[1:] for network, (ranges, _) in found.items()
    }  # the first layer has 9 weights a channel
    for attribute, sign in (("crest", 1), ("sqnr_channel", -1), ("sqnr_tensor", -1)):
        plain, acnet = (sum(getattr(r, attribute) for r in inner[network]) / 3 for network in ("plain", "ACNet"))
        assert sign * (acnet - plain) > 0, attribute
    for _, (exact, int8_tensor, int8_channel, *_) in found.values():
        assert exact > 90
        assert min(int8_tensor, int8_channel) > exact - 2
