"""convert(), fuse(), fold(): whole networks in and out."""

import copy
import warnings

import pytest
import torch
import torchvision
from oracle import rel, scramble
from torch import nn

import acnet_kernels as ak
from acnet_kernels import ACBlock


class Net(nn.Module):
    """A small network with one of everything convert() must tell apart."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, padding=3)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 5, padding=2)
        self.point = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.bn1(self.conv1(self.stem(x))).relu()
        y = self.conv2(x)
        x = self.bn2(y) + y  # conv2's output has two readers: its batch norm must stay
        return self.point(self.bare(x))


class Untraceable(nn.Module):
    """Data-dependent control flow around a Sequential, as detection models have."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        if x.sum() > 0:
            x = x * 1.0
        return self.head(self.body(x))


def converted(model):
    return [name for name, m in model.named_modules() if isinstance(m, ACBlock)]


def note(model, name):
    return next(c.note for c in ak.explain(model).conversions if c.name == name)


def test_what_is_converted_and_why():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    acnet = ak.convert(net)
    assert converted(net) == []
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert converted(acnet) == ["conv1", "conv2", "bare"]
    assert isinstance(acnet.bn1, nn.Identity)
    assert isinstance(acnet.bn2, nn.BatchNorm2d)
    assert note(acnet, "conv1") == "with its batch norm"
    assert note(acnet, "conv2") == "its batch norm bn2 stays after the block: its output goes elsewhere too"
    assert "kernel 7×7 is not among kernel_sizes=[3, 5]" in note(acnet, "stem")
    assert acnet.conv1.square_bn.weight.eq(1).all()
    acnet(torch.randn(2, 3, 9, 9)).sum().backward()
    assert converted(ak.convert(net, kernel_sizes=(1, 7))) == ["stem", "point"]
    assert converted(ak.convert(net, skip=["conv*"])) == ["bare"]
    assert converted(ak.convert(net, skip=lambda name, conv: conv.bias is not None)) == ["conv1"]
    assert ak.convert(net, gamma=0.25).bare.hor_bn.weight.eq(0.25).all()


def test_untraceable_modules_fall_back_to_sequential_order():
    net = scramble(Untraceable()).eval()
    x = torch.randn(2, 3, 8, 8)
    acnet = ak.convert(net, init="from_conv")
    assert converted(acnet) == ["body.0", "head"]
    assert isinstance(acnet.body[1], nn.Identity)
    assert isinstance(acnet.body[2], nn.ReLU)
    assert rel(acnet(x), net(x)) < 1e-6


@pytest.mark.parametrize("build", [Net, Untraceable])
def test_from_conv_keeps_the_function(build):
    net = scramble(build()).eval()
    x = torch.randn(2, 3, 9, 9)
    want = net(x)
    acnet = ak.convert(net, init="from_conv")
    assert rel(acnet(x), want) < 1e-5
    assert not any(module.training for module in acnet.modules())
    assert rel(ak.fuse(acnet)(x), want) < 1e-5


def test_from_conv_keeps_training_too_and_then_wakes_the_branches():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    acnet = ak.convert(net, init="from_conv")
    x = torch.randn(2, 3, 8, 8)
    assert rel(acnet(x), net(x)) < 1e-6
    acnet(x).square().sum().backward()
    assert acnet[0].hor_bn.weight.grad.abs().sum() > 0


def test_upgrade_carries_the_settings_over():
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, padding=2, dilation=2, groups=2, padding_mode="reflect"),
        nn.BatchNorm2d(8, eps=1e-3, momentum=None),
    ).to(memory_format=torch.channels_last)
    net.double().eval()
    net[0].weight.requires_grad_(False)
    block = ak.convert(net)[0]
    assert (block.stride, block.dilation, block.groups, block.padding_mode) == ((2, 2), (2, 2), 2, "reflect")
    assert all(bn.eps == 1e-3 and bn.momentum is None and not bn.training for bn in block.norms().values())
    assert not any(conv.weight.requires_grad for conv in block.convs().values())
    assert block.square_conv.weight.dtype == torch.float64
    assert block.square_conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_shared_modules_stay_shared():
    conv, bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    net = scramble(nn.Sequential(conv, bn, nn.ReLU(), conv, bn)).eval()
    acnet = ak.convert(net, init="from_conv")
    assert acnet[0] is acnet[3]
    assert isinstance(acnet[1], nn.Identity)
    x = torch.randn(2, 4, 8, 8)
    assert rel(acnet(x), net(x)) < 1e-5

    net = scramble(nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4))).eval()
    acnet = ak.convert(net, init="from_conv")  # two different consumers: both batch norms stay
    assert acnet[0] is acnet[2]
    assert isinstance(acnet[1], nn.BatchNorm2d)
    assert rel(acnet(x), net(x)) < 1e-5


def test_ties():
    a, b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
    b.weight = a.weight
    acnet = ak.convert(nn.Sequential(a, b))
    for name in ("square", "hor", "ver"):
        assert getattr(acnet[0], f"{name}_conv").weight is getattr(acnet[1], f"{name}_conv").weight
    c = nn.Conv2d(4, 4, 1)
    transposed = nn.ConvTranspose2d(4, 4, 3)
    transposed.weight = a.weight
    acnet = ak.convert(nn.Sequential(a, b, c, transposed))
    assert converted(acnet) == []
    assert "tied" in note(acnet, "0")
    assert acnet[0].weight is acnet[1].weight is acnet[3].weight


def test_left_alone():
    class Strange(nn.Conv2d):
        pass

    hooked, read = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    hooked.register_forward_hook(lambda *_: None)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = read

        def forward(self, x):
            return torch.nn.functional.conv2d(x, self.conv.weight)

    model = nn.ModuleDict({"strange": Strange(3, 3, 3), "hooked": hooked, "reads": Reads()})
    acnet = ak.convert(model)
    assert converted(acnet) == []
    assert "a Strange" in note(acnet, "strange")
    assert "hooks" in note(acnet, "hooked")
    assert "read outside" in note(acnet, "reads.conv")


def test_a_convolution_alone_and_a_second_convert():
    block = ak.convert(nn.Conv2d(3, 4, 3))
    assert isinstance(block, ACBlock)
    again = ak.convert(block)
    assert again.state_dict().keys() == block.state_dict().keys()


def test_inplace_and_a_backbone_inside_a_unet():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.up = nn.ConvTranspose2d(4, 4, 2, 2)
            self.out = nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x):
            return self.out(self.up(self.backbone(x)))

    net = scramble(UNet())
    before = copy.deepcopy(net.state_dict())
    assert ak.convert(net.backbone, init="from_conv", inplace=True) is net.backbone
    for key, value in net.state_dict().items():
        if not key.startswith("backbone"):
            assert torch.equal(value, before[key])
    assert converted(net) == ["backbone.0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "clever"}, "init must be"),
        ({"init": "from_conv", "gamma": 0.5}, "gamma is for init='fresh'"),
        ({"kernel_sizes": (2,)}, "kernel_sizes must be odd"),
        ({"backend": "magic"}, "backend must be one of"),
    ],
)
def test_wrong_options_leave_the_model(options, words):
    net = Net()
    with pytest.raises(ValueError, match=words):
        ak.convert(net, inplace=True, **options)
    assert converted(net) == []


def test_fuse_leaves_convolutions():
    acnet = scramble(ak.convert(Net())).eval()
    seen = []
    acnet.conv1.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 3, 9, 9)
    want = acnet(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = ak.fuse(acnet)
    assert rel(fused(x), want) < 1e-5
    assert [type(m) for m in (fused.conv1, fused.conv2, fused.bare)] == [nn.Conv2d] * 3
    assert not any(isinstance(m, ACBlock) for m in fused.modules())
    assert seen == [1, 1]
    assert not any(block.deploy for block in acnet.modules() if isinstance(block, ACBlock))
    weight = fused.conv1.weight
    assert ak.fuse(fused, inplace=True) is fused
    assert fused.conv1.weight is weight


def test_fuse_replaces_a_shared_block_everywhere():
    shared = ACBlock(4, 4, 3, padding=1)
    net = scramble(nn.Sequential(shared, nn.ModuleDict({"again": shared})["again"], nn.Sequential(shared))).eval()
    x = torch.randn(2, 4, 6, 6)
    fused = ak.fuse(net)
    assert fused[0] is fused[1] is fused[2][0]
    assert rel(fused(x), net(x)) < 1e-5


def test_fuse_keeps_blocks_where_asked():
    acnet = scramble(ak.convert(Net())).eval()
    x = torch.randn(2, 3, 9, 9)
    deployed = ak.fuse(acnet, keep_blocks=True)
    assert rel(deployed(x), acnet(x)) < 1e-5
    assert all(block.deploy for block in deployed.modules() if isinstance(block, ACBlock))
    weight = deployed.conv1.fused_conv.weight
    assert ak.fuse(deployed, inplace=True, keep_blocks=True).conv1.fused_conv.weight is weight
    assert ak.fuse(deployed, inplace=True).conv1.weight is weight
    assert rel(deployed(x), acnet(x)) < 1e-5


def test_fuse_of_a_block_itself():
    block = scramble(ACBlock(3, 5, 3, padding=1)).eval()
    x = torch.randn(2, 3, 7, 7)
    want = block(x)
    fused = ak.fuse(block)
    assert type(fused) is nn.Conv2d
    assert rel(fused(x), want) < 1e-5
    assert ak.fuse(block, inplace=True) is block
    assert block.deploy
    assert rel(block(x), want) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_fused_network_can_be_scripted():
    net = scramble(nn.Sequential(ACBlock(3, 4, 3, padding=1), nn.ReLU())).eval()
    x = torch.randn(2, 3, 6, 6)
    assert rel(torch.jit.script(ak.fuse(net))(x), net(x)) < 1e-5


def test_fuse_warns_in_train_mode_and_refuses_before_changing():
    acnet = ak.convert(Net())
    with pytest.warns(UserWarning, match="3 of 3 blocks are folded in train mode"):
        ak.fuse(acnet)
    acnet.bare.hor_bn = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match=r"block bare: .*hor_bn has track_running_stats=False"):
        ak.fuse(acnet.eval(), inplace=True)
    assert not acnet.conv1.deploy


def test_fuse_under_inference_mode_can_be_trained_later():
    acnet = scramble(ak.convert(Net())).eval()
    with torch.inference_mode():
        fused = ak.fuse(acnet)
    fused(torch.randn(2, 3, 9, 9)).sum().backward()
    assert fused.conv1.weight.grad is not None


def test_fold_returns_every_block_and_writes_into_out():
    acnet = scramble(ak.convert(Net())).eval()
    folded = ak.fold(acnet)
    assert len(folded) == 3
    for (weight, bias), name in zip(folded, ("conv1", "conv2", "bare"), strict=True):
        w, b = getattr(acnet, name).get_equivalent_kernel_bias()
        torch.testing.assert_close(weight, w)
        torch.testing.assert_close(bias, b)
    folded[0][0].sum().backward()
    assert acnet.conv1.hor_bn.weight.grad is not None
    out = [(torch.full_like(w, float("nan")), torch.full_like(b, float("nan"))) for w, b in folded]
    same = ak.fold([acnet.conv1, acnet.conv2, acnet.bare], out=[(w.detach(), b.detach()) for w, b in out])
    for (weight, bias), (w, b) in zip(same, folded, strict=True):
        torch.testing.assert_close(weight, w.detach())
        torch.testing.assert_close(bias, b.detach())
    assert ak.fold([]) == []
    with pytest.raises(TypeError, match="model_or_blocks"):
        ak.fold([3])
    with pytest.raises(ValueError, match="deployed"):
        ak.fold(ak.fuse(acnet, keep_blocks=True))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "alexnet"])
def test_torchvision_networks_fold(name):
    net = scramble(ak.convert(torchvision.models.get_model(name, weights=None, num_classes=10))).eval()
    kernels = {m.kernel_size for m in net.modules() if isinstance(m, ACBlock)}
    assert kernels == {"resnet18": {(3, 3)}, "densenet121": {(3, 3)}, "alexnet": {(3, 3), (5, 5)}}[name]
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        want = copy.deepcopy(net).double()(x.double())
        assert rel(net(x), want) < 1e-4
        assert rel(ak.fuse(net)(x), want) < 1e-4


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v2", "vgg11_bn", "fcn_resnet50"])
def test_torchvision_networks_upgrade(name):
    options = {"weights_backbone": None} if name.startswith("fcn") else {}
    options |= {"init_weights": False} if name == "googlenet" else {}
    net = scramble(torchvision.models.get_model(name, weights=None, num_classes=10, **options)).eval()
    acnet = ak.convert(net, init="from_conv")
    assert converted(acnet)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want, got = net(x), acnet(x)
    want, got = (want["out"], got["out"]) if isinstance(want, dict) else (want, got)
    assert rel(got, want) < 1e-4
    left = [c.note for c in ak.explain(acnet).conversions if c.converted and c.note != "with its batch norm"]
    assert not left or name == "fcn_resnet50"


def test_frozen_batch_norms_are_taken_over():
    """Detection backbones are built of them; the other branches must be able to learn all the same."""
    frozen = torchvision.ops.FrozenBatchNorm2d
    net = scramble(torchvision.models.resnet18(weights=None, norm_layer=nn.BatchNorm2d))
    source = torchvision.models.resnet18(weights=None, norm_layer=frozen)
    source.load_state_dict({k: v for k, v in net.state_dict().items() if k in source.state_dict()})
    x = torch.randn(2, 3, 40, 40)
    acnet = ak.convert(source, init="from_conv")
    blocks = [m for m in acnet.modules() if isinstance(m, ACBlock)]
    assert len(blocks) == 16
    assert type(acnet.layer1[0].bn1) is nn.Identity
    assert {row.backend for row in ak.explain(acnet.train(), x).blocks} == {"folded"}
    assert rel(acnet(x), source(x)) < 1e-5
    acnet(x).square().sum().backward()
    assert all(b.hor_conv.weight.grad.abs().sum() > 0 for b in blocks)
    assert rel(ak.fuse(acnet.eval())(x), source(x)) < 1e-5
    with torch.no_grad():
        for block in blocks:
            block.hor_conv.weight += torch.randn_like(block.hor_conv.weight)
    assert rel(ak.fuse(acnet)(x), acnet(x)) < 1e-4


def test_a_batch_norm_in_eval_without_gradients_silences_no_branch_for_good():
    net = scramble(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))).eval()
    net[1].requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    acnet = ak.convert(net, init="from_conv")
    assert rel(acnet(x), net(x)) < 1e-5
    acnet(x).square().sum().backward()
    assert acnet[0].ver_conv.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for name, p in acnet.named_parameters() if "_bn" in name)
