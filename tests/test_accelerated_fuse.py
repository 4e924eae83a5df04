"""fuse() on other libraries' blocks, where their own folding fails, or does something else.

What timm 1.0's and the original repositories' own code does on these: timm's and RepVGG's assert on any batch norm
that is no nn.BatchNorm2d, so on every synchronised one; fastvit's MobileOneBlock gives its folded convolution the
dilation that its branches ignore; repvit's pads every kernel as a 3×3; the folded form that byobnet builds by
inference_mode=True has no padding; YOLOv7's identity is wrong for groups > 1, silently; in train mode all of them
fold by the running statistics and say nothing.
"""

import copy
import warnings

import pytest
import stand_ins
import torch
from oracle import rel
from torch import nn

import acnet_kernels as ak
from acnet_kernels.acceleration import Accelerated
from acnet_kernels.adapters.proof import scrambled

timm = pytest.importorskip("timm", reason="most of the blocks are its: extra `test`")
from timm.layers import convert_sync_batchnorm  # noqa: E402
from timm.models import byobnet, fastvit, lcnetv2, repghost, repvit  # noqa: E402
from timm.utils.model import reparameterize_model  # noqa: E402

SHAPE = (2, 8, 11, 9)
BLOCKS = {
    "dilation 2": lambda: byobnet.RepVggBlock(8, 8, 3, dilation=(2, 2)),
    "dilation 2 that the branches ignore": lambda: fastvit.MobileOneBlock(8, 8, 3, dilation=2),
    "k = 1": lambda: byobnet.MobileOneBlock(8, 8, 1, num_conv_branches=2),
    "k = 5": lambda: byobnet.RepVggBlock(8, 8, 5),
    "k = 5, depthwise": lambda: repvit.RepVggDw(8, 5),
    "k = 7, depthwise": lambda: fastvit.ReparamLargeKernelConv(8, 8, 7, 1, 1, 3),
    "k = 7, mixer": lambda: fastvit.RepMixer(8, 7, layer_scale_init_value=0.3),
    "groups = 2": lambda: byobnet.RepVggBlock(8, 8, 3, group_size=4),
    "groups = 2, YOLOv7": lambda: stand_ins.V7(8, 8, groups=2),
    "groups = 2, RepVGG": lambda: stand_ins.RepVGGBlock(8, 8, groups=2),
    "groups = 2, ultralytics": lambda: stand_ins.RepConv(8, 8, groups=2, bn=True),
    "quantisation-aware": lambda: stand_ins.QARepVGGBlock(8, 8, groups=4),
    "cropped": lambda: stand_ins.ACBlock(8, 8, 5, padding=1),
    "cropped by layers": lambda: stand_ins.acblock_with_layers(8, 8, 3),
    "stride 2": lambda: stand_ins.MobileOneBlock(8, 8, 3, 2, groups=8, copies=4),
    "ghost": lambda: repghost.RepGhostModule(8, 8),
    "depthwise before pointwise": lambda: lcnetv2.RepDepthwiseSeparable(
        8, 8, 1, 5, use_rep=True, use_shortcut=True
    ),
}
CHANGES = {
    "as it is": lambda b: b,
    "float64": lambda b: b.double(),
    "accelerated": ak.accelerate,
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "SyncBatchNorm, then accelerated": lambda b: ak.accelerate(convert_sync_batchnorm(b)),
    "accelerated, then SyncBatchNorm": lambda b: convert_sync_batchnorm(ak.accelerate(b)),
    "channels_last": lambda b: b.to(memory_format=torch.channels_last),
}


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_a_folded_block_is_the_block_in_eval(make, change):
    plain = scrambled(make()).eval()
    net = nn.Sequential(change(copy.deepcopy(plain)))
    x = torch.randn(SHAPE).to(next(net.parameters()))
    # Not of `plain`: nn.SyncBatchNorm's conversion drops an activation that timm has inside a batch norm.
    want = ak.restore(copy.deepcopy(net)).double()(x.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = ak.fuse(net)
    got = folded(x)
    assert rel(got, want) < (1e-12 if x.dtype == torch.float64 else 1e-5)
    assert got.dtype == x.dtype
    assert not any(isinstance(m, Accelerated) for m in folded.modules())
    outside = 2 if isinstance(plain, (repghost.RepGhostModule, lcnetv2.RepDepthwiseSeparable)) else 0
    assert len(norms(folded)) <= outside
    assert len(norms(net)) > len(norms(folded))  # a copy was folded
    assert all(p.requires_grad for p in folded.parameters())
    folded(x).sum().backward()  # what is folded can be trained further
    # A second fold, and the library's own, find nothing left to do.
    assert rel(ak.fuse(folded)(x), want) < 1e-5
    if not isinstance(plain, fastvit.ReparamLargeKernelConv):  # whose own may not be called twice
        assert rel(reparameterize_model(folded)(x), want) < 1e-5


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_folding_in_train_mode_warns(make):
    net = nn.Sequential(make())
    with pytest.warns(UserWarning, match="1 of 1 blocks are folded in train mode"):
        folded = ak.fuse(net)
    assert all(m.training for m in folded.modules())


def test_a_single_block_and_what_hangs_on_it():
    block = scrambled(repvit.RepVggDw(8, 3)).eval()
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(SHAPE)
    want = block(x)
    for inplace in (False, True):
        folded = ak.fuse(block, inplace)
        assert type(folded) is nn.Conv2d
        torch.testing.assert_close(folded(x), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3
    own = scrambled(byobnet.RepVggBlock(8, 8, 3)).eval()
    want = own(x)
    assert ak.fuse(own, inplace=True) is own
    torch.testing.assert_close(own(x), want, rtol=1e-4, atol=1e-5)
    assert norms(own) == []


def test_the_librarys_folded_form_has_its_state_dict():
    for make in (BLOCKS["k = 5"], BLOCKS["k = 7, mixer"], BLOCKS["ghost"], BLOCKS["depthwise before pointwise"]):
        plain = scrambled(make()).eval()
        ours, theirs = ak.fuse(plain).state_dict(), reparameterize_model(nn.Sequential(plain))[0].state_dict()
        assert ours.keys() == theirs.keys()
        for name, t in theirs.items():
            torch.testing.assert_close(ours[name], t, rtol=1e-4, atol=1e-5)


def test_drop_path_between_the_branches_folds_away():
    block = scrambled(byobnet.RepVggBlock(8, 8, 3, drop_path_rate=0.5)).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(ak.fuse(block)(x), block(x), rtol=1e-4, atol=1e-5)


def test_what_does_not_fold_is_named_and_left_as_it_was():
    net = nn.Sequential(byobnet.RepVggBlock(8, 8, 3), byobnet.RepVggBlock(8, 8, 3)).eval()
    net[1].conv_1x1.bn.track_running_stats = False
    net[1].conv_1x1.bn.running_mean = net[1].conv_1x1.bn.running_var = None
    with pytest.raises(ValueError, match=r"block 1: cannot fold: conv_1x1.bn has track_running_stats=False"):
        ak.fuse(net, inplace=True)
    assert net[0].reparam_conv is None
    net[1] = byobnet.RepVggBlock(8, 8, 3).eval()
    net[1].conv_kxk.register_forward_hook(lambda m, args, out: out * 2)
    with pytest.raises(ValueError, match="block 1: cannot fold: a branch's container has hooks"):
        ak.fuse(net)


def test_accelerated_blocks_fold_differentiably():
    block = ak.accelerate(scrambled(byobnet.RepVggBlock(8, 8, 3))).eval()
    ((weight, bias),) = ak.fold(block)
    (weight.sum() + bias.sum()).backward()
    assert block.conv_1x1.bn.weight.grad is not None


def test_an_acnet_made_of_a_repvgg_folds_inside_its_blocks():
    net = ak.convert(nn.Sequential(byobnet.RepVggBlock(3, 8, 3), byobnet.RepVggBlock(8, 8, 3))).eval()
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(ak.fuse(net)(x), net(x), rtol=1e-4, atol=1e-5)
