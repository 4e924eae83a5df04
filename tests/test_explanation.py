"""explain(): the table and what it must not disturb."""

import copy

import pytest
import torch
from torch import nn

import acnet_kernels as ak
from acnet_kernels import ACBlock
from acnet_kernels.backends import node, planner
from acnet_kernels.ops import _extension
from acnet_kernels.steps import assignment


def network():
    return nn.Sequential(
        ACBlock(3, 8, 3, padding=1),
        nn.ReLU(),
        ACBlock(8, 8, 3, stride=2, padding=1),
        nn.Dropout(),
        ACBlock(8, 4, 3),
    )


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]


def test_shapes_paths_and_totals():
    net = network()
    net[2].eval()
    net[4].hor_conv.register_forward_hook(lambda *_: None)
    before = state(net)
    table = ak.explain(net, (2, 3, 10, 12))
    after = state(net)
    assert before[1] == after[1]
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    first, second, third = table.blocks
    assert (first.name, first.input_shape, first.output_shape) == ("0", (2, 3, 10, 12), (2, 8, 10, 12))
    assert (second.backend, second.output_shape) == ("folded", (2, 8, 5, 6))
    assert second.saved_bytes == 2 * 8 * 10 * 12 * 4
    assert (third.backend, third.reason) == ("eager", "through the submodules: hor_conv has hooks")
    assert first.parameters == sum(p.numel() for p in net[0].parameters())
    text = str(table)
    assert "2×3×10×12" in text
    assert "3 blocks" in text


def test_it_says_that_the_node_is_missing_and_why(monkeypatch):
    x, blocks = (2, 4, 6, 6), [ACBlock(4, 4, 3, padding=1, backend=name) for name in ("moments", "eager")]
    monkeypatch.setattr(node, "NODE", None)
    monkeypatch.setattr(_extension, "WHY_NODE_MISSING", "it is not built")
    said = [ak.explain(block, x).blocks[0].reason for block in blocks]
    assert said == ["requested; in Python's autograd node: it is not built", "requested"]
    monkeypatch.setattr(assignment, "DEVICE", "cpu")  # on CUDA it is for `branches` alone
    on_device = [ACBlock(4, 4, 3, padding=1, backend=name) for name in ("branches", "moments")]
    said = [ak.explain(block, x).blocks[0].reason for block in on_device]
    assert [why.endswith("; in Python's autograd node: it is not built") for why in said] == [True, False]


def test_the_plan_is_the_one_the_model_will_run():
    net = network()
    planned = [row.backend for row in ak.explain(net, torch.randn(2, 3, 10, 12)).blocks]
    ran = []
    originals = {name: module.forward for name, module in planner.BACKENDS.items()}
    try:
        for name, module in planner.BACKENDS.items():
            module.forward = lambda x, step, name=name: ran.append(name) or originals[name](x, step)
        net(torch.randn(2, 3, 10, 12))
    finally:
        for name, module in planner.BACKENDS.items():
            module.forward = originals[name]
    assert ran == planned


@pytest.mark.parametrize("backend", ["eager", "folded"])
def test_saved_bytes_are_what_autograd_keeps(backend):
    block = ACBlock(4, 8, 3, padding=1, backend=backend).train(backend == "eager")
    x = torch.randn(8, 4, 24, 24)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x)
    maps = sum(size for size in kept.values() if size >= 10_000)  # smaller are weights and statistics
    assert ak.explain(block, x).blocks[0].saved_bytes == maps


def test_without_shapes_without_blocks_and_deployed():
    net = network()
    assert [row.backend for row in ak.explain(net).blocks] == ["?"] * 3
    assert [row.backend for row in ak.explain(net.eval()).blocks] == ["folded"] * 3
    deployed = ak.fuse(net, keep_blocks=True)
    assert [row.backend for row in ak.explain(deployed, (1, 3, 9, 9)).blocks] == ["deployed"] * 3
    assert "no block" in str(ak.explain(ak.fuse(net)))
    assert "no block" in str(ak.explain(nn.ReLU()))
    assert "left" in str(ak.explain(ak.convert(nn.Sequential(nn.Conv2d(3, 3, 7)))))


def test_a_block_called_twice_and_one_never_called():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ACBlock(3, 3, 3), ACBlock(3, 3, 3)

        def forward(self, x):
            return self.a(self.a(x))

    rows = ak.explain(Net(), (1, 3, 9, 9)).blocks
    assert [(row.name, row.input_shape) for row in rows] == [("a", (1, 3, 9, 9)), ("a", (1, 3, 7, 7)), ("b", None)]


def test_a_failing_model_is_left_as_it_was():
    net = network()
    before = copy.deepcopy(state(net)[1])
    table = ak.explain(net, (1, 5, 9, 9))
    assert "input must have 3 channels, got 5" in table.failure
    assert table.failure in str(table)
    assert [row.name for row in table.blocks] == ["0", "2", "4"]
    assert state(net)[1] == before
    assert not net[0]._forward_pre_hooks
    with pytest.raises(TypeError, match="inputs must be"):
        ak.explain(net, "1,3,9,9")
