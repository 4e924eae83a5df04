"""convert(fuse_activations=True): activations taken over by blocks, and residual blocks that add within them."""

import copy
import io
import pickle

import pytest
import torch
from oracle import scramble
from stacks import through_modules
from torch import nn

from acnet_kernels import ACBlock, convert, explain, fuse, restore
from acnet_kernels.absorbing import absorbable
from acnet_kernels.paper.models import build
from acnet_kernels.residual import Residual, finished, recognise

torchvision = pytest.importorskip("torchvision", reason="its networks are converted: extra `test`")
timm = pytest.importorskip("timm", reason="its networks are converted: extra `test`")
from timm.models import resnet as timm_resnet  # noqa: E402
from torchvision.models import resnet  # noqa: E402


def stem(*more):
    return [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), *more]


class Twice(nn.Module):
    """One ReLU of two maps."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


class Shared(nn.Module):
    """A map that goes through its activation and elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.SiLU()

    def forward(self, x):
        y = self.conv(x)
        return self.act(y) + y


class Untraceable(nn.Module):
    """Its forward asks for a value."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*stem(nn.ReLU()))

    def forward(self, x):
        return self.net(x) if x.sum() > -1e9 else x


def hooked():
    net = nn.Sequential(*stem(nn.ReLU()))
    net[2].register_forward_hook(lambda m, i, o: None)
    return net


TAKEN = {
    "ReLU": (lambda: nn.Sequential(*stem(nn.ReLU(inplace=True))), 1),
    "three in a row": (lambda: nn.Sequential(*stem(nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Hardswish(), nn.ReLU6())), 2),
    "without a batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 1),
    "nothing between": (lambda: nn.Sequential(*stem(nn.Identity(), nn.ReLU())), 1),
    "untraceable": (Untraceable, 1),
    "two maps": (Twice, 0),
    "elsewhere too": (Shared, 0),
    "hooks": (hooked, 0),
    "another activation": (lambda: nn.Sequential(*stem(nn.GELU())), 0),
    "dropout between": (lambda: nn.Sequential(*stem(nn.Dropout(), nn.ReLU())), 0),
}


@pytest.mark.parametrize("init", ["fresh", "from_conv"])
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_absorbed(name, init):
    make, count = TAKEN[name]
    net = make()
    torch.manual_seed(0)
    plain = convert(net, init=init)
    torch.manual_seed(0)
    fused = convert(net, init=init, fuse_activations=True)
    blocks = [m for m in fused.modules() if isinstance(m, ACBlock)]
    assert sum(block.activation is not None for block in blocks) == count
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, 9, 8)
    for train in (True, False):
        fused.train(train), plain.train(train)
        if "dropout" in name:
            continue
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fuse(fused.eval())(x), fuse(plain.eval())(x), rtol=1e-4, atol=1e-5)
    notes = [c.note for c in explain(fused).conversions]
    assert sum(", and " in note for note in notes) == count
    assert not absorbable(fused)


RESIDUAL = {
    "torchvision basic": lambda: resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=3),
    "torchvision bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=3),
    "timm basic": lambda: timm.create_model("resnet10t", num_classes=3),
    "timm bottleneck": lambda: timm_resnet.ResNet(timm_resnet.Bottleneck, (1, 1, 1, 1), num_classes=3),
    "timm with se": lambda: timm_resnet.ResNet(
        timm_resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, block_args={"attn_layer": "se"}
    ),
    "paper's": lambda: build("resnet8", 3),
}


def step(net, x):
    out = net(x)
    grads = torch.autograd.grad(
        out.square().sum(), [p for p in net.parameters() if p.requires_grad], allow_unused=True
    )
    return [out, *grads, *(t.clone() for t in net.buffers())]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_blocks_of_other_libraries(name):
    net = RESIDUAL[name]().double()
    fused = scramble(net if "paper" in name else convert(net, fuse_activations=True))
    twin = through_modules(fused)  # and with each library's own forward
    restore(twin)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert any(isinstance(m, Residual) for m in fused.modules()) == ("paper" not in name)
    for got, want in zip(step(fused, x), step(twin, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    fused.eval(), twin.eval()
    want = twin(x)
    others = [fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse(fused)]
    if "paper" not in name and "timm" not in name:
        others += [torch.fx.symbolic_trace(fused), restore(copy.deepcopy(fused))]
    for other in others:
        torch.testing.assert_close(other(x), want, rtol=1e-6, atol=1e-8)


def test_the_shortcut_is_added_within_the_block(monkeypatch):
    seen = []
    forward = ACBlock.forward
    monkeypatch.setattr(
        ACBlock,
        "forward",
        lambda self, x, residual=None, activation=None: (
            seen.append((residual is not None, activation or self.activation))
            or forward(self, x, residual, activation)
        ),
    )
    block = convert(resnet.BasicBlock(4, 4), fuse_activations=True)
    block(torch.randn(2, 4, 6, 6))
    assert seen == [(False, "relu"), (True, "relu")]
    seen.clear()
    convert(timm_resnet.BasicBlock(4, 4), fuse_activations=True)(torch.randn(2, 4, 6, 6))
    assert seen == [(False, "relu"), (True, "relu")]
    seen.clear()
    block.relu.register_forward_hook(lambda m, i, o: None)  # to be called, then
    block(torch.randn(2, 4, 6, 6))
    assert seen == [(False, None), (False, None)]


def test_it_is_still_the_librarys_block():
    block = convert(resnet.BasicBlock(4, 4), fuse_activations=True)
    assert isinstance(block, resnet.BasicBlock)
    assert type(block).__name__ == "BasicBlock"
    assert type(block) is type(convert(resnet.BasicBlock(4, 4), fuse_activations=True))
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is type(block)
    assert type(restore(block)) is resnet.BasicBlock
    assert recognise(nn.Sequential) is None
    assert type(convert(resnet.BasicBlock(4, 4))) is resnet.BasicBlock


def test_under_autocast_with_a_wider_shortcut():
    block = convert(resnet.BasicBlock(4, 4), fuse_activations=True)
    twin = restore(copy.deepcopy(block))
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = block(x), twin(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_finished_of_any_layer():
    x, residual = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    for layer in (
        nn.Conv2d(4, 4, 3, padding=1),
        ACBlock(4, 4, 3, padding=1),
        ACBlock(4, 4, 3, 1, 1, activation="silu"),
    ):
        torch.testing.assert_close(finished(layer, x, "relu", residual), (layer(x) + residual).relu())
        assert torch.equal(finished(layer, x, ""), layer(x))
    with pytest.raises(ValueError, match="activation must be None for a block that has one itself"):
        layer(x, activation="relu")


@pytest.mark.slow
def test_compiled():
    net = convert(resnet.BasicBlock(4, 4), fuse_activations=True)
    twin, x = copy.deepcopy(net), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-3, atol=1e-3)
