"""Every class that accelerate() knows, against its own forward; and what is left alone, and why."""

import re

import pytest
import stand_ins
import torch
from torch import nn

import acnet_kernels as ak
from acnet_kernels.adapters import ADAPTERS, Adapter, branch_in, prove, recognise

timm = pytest.importorskip("timm", reason="most of the blocks are its: extra `test`")
from timm.models import byobnet, fastvit, lcnetv2, repghost, repvit  # noqa: E402


def transformers_block(module, name, config, *args, **options):
    """Builds transformers.models.<module>'s block of this name; skips where it is not installed."""

    def make():
        found = pytest.importorskip(
            f"transformers.models.{module}.modeling_{module}", reason="its blocks are checked: extra `test`"
        )
        first = [getattr(found, config)(**options)] if config else []
        return getattr(found, name)(*first, *args)

    return make


ORIGINAL = {
    "ACBlock": lambda: stand_ins.ACBlock(4, 6, 3, padding=1),
    "ACBlock 5/2": lambda: stand_ins.ACBlock(4, 6, 5, stride=2, padding=2, groups=2),
    "ACBlock, cropped": lambda: stand_ins.ACBlock(4, 6, 3),
    "ACBlock, cropped by one of two": lambda: stand_ins.ACBlock(4, 6, 5, padding=1),
    "ACBlock, padded more": lambda: stand_ins.ACBlock(4, 6, 3, padding=2),
    "earlier ACBlock": lambda: stand_ins.acblock_with_layers(4, 6, 3, padding=1),
    "earlier ACBlock, cropped": lambda: stand_ins.acblock_with_layers(4, 6, 3),
    "RepVGGBlock": lambda: stand_ins.RepVGGBlock(4, 4),
    "RepVGGBlock g2 d2": lambda: stand_ins.RepVGGBlock(4, 4, groups=2, dilation=2),
    "RepVGGBlock k5 /2": lambda: stand_ins.RepVGGBlock(4, 6, 5, 2),
    "QARepVGGBlock": lambda: stand_ins.QARepVGGBlock(4, 4),
    "QARepVGGBlock /2": lambda: stand_ins.QARepVGGBlock(4, 6, stride=2),
    "MobileOneBlock": lambda: stand_ins.MobileOneBlock(4, 4, 3, groups=4, copies=4),
    "MobileOneBlock k1": lambda: stand_ins.MobileOneBlock(4, 6, 1, copies=2),
    "YOLOv7 RepConv": lambda: stand_ins.V7(4, 4, groups=2),
    "YOLOv7 RepConv /2": lambda: stand_ins.V7(4, 6, stride=2),
    "ultralytics RepConv": lambda: stand_ins.RepConv(4, 4, bn=True),
    "YOLOv9 RepConvN": lambda: stand_ins.RepConv(4, 6, 2),
    "YOLOv10 RepVGGDW": lambda: stand_ins.RepVGGDW(4),
}
TIMM = {
    "byobnet RepVggBlock": lambda: byobnet.RepVggBlock(4, 4, 3),
    "byobnet RepVggBlock d2": lambda: byobnet.RepVggBlock(4, 4, 3, dilation=(2, 2)),
    "byobnet RepVggBlock g2 /2": lambda: byobnet.RepVggBlock(4, 6, 3, 2, group_size=2),
    "byobnet MobileOneBlock": lambda: byobnet.MobileOneBlock(4, 4, 3, group_size=1, num_conv_branches=4),
    "byobnet MobileOneBlock k1": lambda: byobnet.MobileOneBlock(4, 4, 1, num_conv_branches=2),
    "byobnet MobileOneBlock se": lambda: byobnet.MobileOneBlock(
        4, 6, 3, 2, layers=byobnet.LayerFn(attn=timm.layers.SqueezeExcite)
    ),
    "fastvit MobileOneBlock": lambda: fastvit.MobileOneBlock(4, 4, 3, group_size=1),
    "fastvit MobileOneBlock se /2": lambda: fastvit.MobileOneBlock(4, 6, 3, 2, use_se=True, num_conv_branches=2),
    "RepMixer": lambda: fastvit.RepMixer(4, 3, layer_scale_init_value=0.5),
    "RepMixer of γ = 1e-5": lambda: fastvit.RepMixer(4, 3),
    "RepMixer without γ": lambda: fastvit.RepMixer(4, 3, layer_scale_init_value=None),
    "ReparamLargeKernelConv": lambda: fastvit.ReparamLargeKernelConv(4, 8, 7, 2, 1, 3),
    "RepVggDw": lambda: repvit.RepVggDw(4, 3),
    "RepVggDw k5": lambda: repvit.RepVggDw(4, 5),
    "RepVggDw, legacy": lambda: repvit.RepVggDw(4, 3, legacy=True),
    "RepGhostModule": lambda: repghost.RepGhostModule(4, 6),
    "RepGhostModule without relu": lambda: repghost.RepGhostModule(4, 6, relu=False),
    "RepDepthwiseSeparable": lambda: lcnetv2.RepDepthwiseSeparable(
        4, 4, 1, 5, use_rep=True, use_se=True, use_shortcut=True
    ),
    "RepDepthwiseSeparable /2": lambda: lcnetv2.RepDepthwiseSeparable(4, 6, 2, 5, use_rep=True, split_pw=True),
}
TEXTNET = ("textnet", "TextNetRepConvLayer", "TextNetConfig")
PPLCNET = ("pp_lcnet_v3", "PPLCNetV3LearnableRepLayer", "")
TRANSFORMERS = {
    "TextNet": transformers_block(*TEXTNET, 4, 4, (3, 3), 1),
    "TextNet /2": transformers_block(*TEXTNET, 4, 6, (3, 3), 2),
    "TextNet 1×3": transformers_block(*TEXTNET, 4, 4, (1, 3), 1),
    "TextNet 3×1": transformers_block(*TEXTNET, 4, 4, (3, 1), 1),
    "RT-DETR": transformers_block("rt_detr", "RTDetrRepVggBlock", "RTDetrConfig", encoder_hidden_dim=4),
    "RT-DETRv2": transformers_block("rt_detr_v2", "RTDetrV2RepVggBlock", "RTDetrV2Config", encoder_hidden_dim=4),
    "D-FINE": transformers_block("d_fine", "DFineRepVggBlock", "DFineConfig", 4, 6),
    "OmDet-Turbo": transformers_block(
        "omdet_turbo", "OmDetTurboRepVggBlock", "OmDetTurboConfig", encoder_hidden_dim=4
    ),
    "EfficientLoFTR": transformers_block(
        "efficientloftr",
        "EfficientLoFTRRepVGGBlock",
        "EfficientLoFTRConfig",
        1,
        1,
        hidden_size=4,
        num_attention_heads=1,
        stage_num_blocks=[1, 2],
        out_features=[4, 4],
        stage_stride=[2, 1],
    ),
    "PP-LCNetV3": transformers_block(*PPLCNET, 4, 4, 3, "hardswish", 1, 4, 4),
    "PP-LCNetV3 k1": transformers_block(*PPLCNET, 4, 6, 1, "hardswish", 1, 4),
    "PP-LCNetV3 k5 /2": transformers_block(*PPLCNET, 4, 4, 5, "hardswish", 2, 4, 4),
}
BLOCKS = {**ORIGINAL, **TIMM, **TRANSFORMERS}
every_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
SHAPE = (3, 4, 9, 7)


@every_block
def test_a_block_is_what_it_was(make):
    prove(make(), SHAPE)


@every_block
def test_a_block_is_what_it_was_under_autocast(make):
    prove(make(), SHAPE, autocast=torch.bfloat16, backends=("branches",))


@pytest.mark.parametrize("make", [*TIMM.values(), *ORIGINAL.values()], ids=[*TIMM, *ORIGINAL])
def test_a_block_is_what_it_was_in_float64_and_channels_last(make):
    x = torch.randn(SHAPE).double().to(memory_format=torch.channels_last)
    prove(make().double().to(memory_format=torch.channels_last), x, backends=("branches",))


@pytest.mark.parametrize("name", ["byobnet RepVggBlock", "RepVggDw", "RepMixer", "ACBlock"])
def test_a_block_of_half_precision_is_what_it_was(name):
    prove(BLOCKS[name]().bfloat16(), torch.randn(SHAPE).bfloat16(), backends=("branches",))


def test_a_mixer_keeps_float32_under_autocast_as_the_librarys_does():
    prove(BLOCKS["RepMixer"](), torch.randn(SHAPE), autocast=torch.bfloat16)


def test_every_adapter_has_a_block():
    used = {id(recognise(type(make()))) for make in {**ORIGINAL, **TIMM}.values()}
    names = {type(adapter).__name__ for adapter in ADAPTERS if id(adapter) not in used}
    in_transformers = {
        "TextNetRepConvLayer",
        "DetrRepVggBlock",
        "EfficientLoFTRRepVGGBlock",
        "PPLCNetV3LearnableRepLayer",
    }
    assert names == {*in_transformers, "SequentialRepVggBlock"}


def reason(block):
    """Why accelerate() leaves a block alone, as explain() says."""
    kind = type(block)
    assert ak.accelerate(block) is block
    assert type(block) is kind
    (left,) = ak.explain(block).left
    assert left.reason in str(ak.explain(block))
    return left.reason


def changed(block, path, module):
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)
    return block


def hooked(block, path):
    block.get_submodule(path).register_forward_hook(lambda *_: None)
    return block


def rep():
    return byobnet.RepVggBlock(4, 4, 3)


LEFT = {
    "a drop path between the branches": (
        lambda: byobnet.RepVggBlock(4, 4, 3, drop_path_rate=0.1),
        "drop_path, between the branches, is a DropPath",
    ),
    "a batch norm with an activation": (
        lambda: changed(rep(), "conv_kxk.bn", timm.layers.BatchNormAct2d(4)),
        "conv_kxk.bn is a BatchNormAct2d with act of its own inside the sum",
    ),
    "an activation in a container": (
        lambda: stand_ins.RepConv(4, 4, act=True),
        "conv1 holds conv, bn, act, not a convolution and a batch norm",
    ),
    "a hook on a convolution": (lambda: hooked(rep(), "conv_1x1.conv"), "conv_1x1.conv has hooks"),
    "a hook on a container": (lambda: hooked(rep(), "conv_kxk"), "a branch's container has hooks"),
    "a hook on what does nothing": (
        lambda: hooked(rep(), "drop_path"),
        "drop_path, between the branches, .* has hooks",
    ),
    "a padded batch norm, as in DBB": (
        lambda: changed(stand_ins.RepVGGBlock(4, 4), "rbr_dense.bn", PaddedNorm(4)),
        "rbr_dense.bn is a PaddedNorm, not a plain nn.BatchNorm2d",
    ),
    "another norm": (
        lambda: changed(rep(), "identity", nn.GroupNorm(2, 4)),
        "identity is a GroupNorm, not a plain nn.BatchNorm2d",
    ),
    "another convolution": (
        lambda: changed(rep(), "conv_kxk.conv", PaddedConv(4, 4, 3, padding=1)),
        "conv_kxk.conv is a PaddedConv, not a plain nn.Conv2d",
    ),
    "no convolution": (
        lambda: changed(rep(), "conv_1x1.conv", nn.Identity()),
        "conv_1x1 holds bn, not a convolution",
    ),
    "another container": (lambda: changed(rep(), "conv_1x1", Twice()), "conv_1x1 is a Twice, whose forward is not"),
    "another padding": (
        lambda: changed(rep(), "conv_1x1.conv", nn.Conv2d(4, 4, 1, padding=1)),
        r"conv_1x1.conv's padding is \(1, 1\), where a block like conv_kxk.conv has \(0, 0\)",
    ),
    "a forward of its own": (lambda: with_forward(rep()), "it has a forward of its own"),
    "an even kernel": (
        lambda: changed(rep(), "conv_kxk.conv", nn.Conv2d(4, 4, 4, padding=1)),
        "conv_1x1.conv's kernel of 1×1 is not in the middle of one of 4×4",
    ),
    "no padding": (lambda: stand_in_without_padding(), "map does not fit that of a kernel with padding"),
    "folded already": (lambda: folded_by_host(rep()), "it is folded already, by its own library"),
    "no branches": (
        lambda: fastvit.MobileOneBlock(4, 4, 3, num_conv_branches=0, use_scale_branch=False),
        "it has 1 br",
    ),
    "too many branches": (
        lambda: byobnet.MobileOneBlock(4, 4, 3, num_conv_branches=7),
        "it has 9 branches, 8 of them convolutions",
    ),
    "a single convolution": (
        lambda: lcnetv2.RepDepthwiseSeparable(4, 4),
        "its depthwise convolution is a single one",
    ),
    "another version": (lambda: Newer(4, 4, 3), "its forward is not a known RepVggBlock's: it reads blur"),
    "a blur in a container": (lambda: large_with_blur(), "large_conv holds conv, bn, aa, not a convolution and"),
}


class PaddedNorm(nn.BatchNorm2d):
    """Pads with what zero becomes."""

    def forward(self, x):
        return nn.functional.pad(super().forward(x), (1, 1, 1, 1))


class PaddedConv(nn.Conv2d):
    """Another class, whatever it does."""


class Twice(nn.Module):
    """A convolution and a batch norm, and more."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x).mul(2))


class Newer(byobnet.RepVggBlock):
    """As another release might have it."""

    def forward(self, x):
        return self.blur(super().forward(x))


Newer.__name__ = "RepVggBlock"


def with_forward(block):
    block.forward = lambda x: x
    return block


def stand_in_without_padding():
    return changed(stand_ins.RepVGGBlock(4, 6), "rbr_dense.conv", nn.Conv2d(4, 6, 3, bias=False))


def folded_by_host(block):
    block.eval().reparameterize()
    return block


def large_with_blur():
    block = fastvit.ReparamLargeKernelConv(4, 4, 7, 1, 1, 3)
    block.large_conv.aa = nn.AvgPool2d(1)
    return block


@pytest.mark.parametrize(("make", "words"), LEFT.values(), ids=LEFT)
def test_what_is_left_alone_and_why(make, words):
    assert re.search(words, reason(make()))


@pytest.mark.parametrize(("module", "name"), [("rf_detr", "RfDetr"), ("lw_detr", "LwDetr")])
def test_two_convolutions_in_sequence_are_no_branches(module, name):
    block = transformers_block(module, f"{name}RepVggBlock", f"{name}Config", d_model=8)()
    assert reason(block) == "its two convolutions follow each other"


def test_what_has_no_name_that_is_known_is_no_business_of_ours():
    table = ak.explain(ak.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), stand_ins.Conv(4, 4))))
    assert (table.blocks, table.left) == ([], [])


class Pair(nn.Module):
    """A block of a library that nobody has heard of: docs/adapters.md has it too."""

    def __init__(self, channels):
        super().__init__()
        self.wide = stand_ins.conv_bn(channels, channels, 3, 1, 1)
        self.narrow = stand_ins.conv_bn(channels, channels, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.wide(x) + self.narrow(x))


class PairAdapter(Adapter):
    classes = ("Pair",)
    reads = frozenset({"act", "wide", "narrow"})
    after = ("act",)

    def branches(self, block):
        yield branch_in(block, "wide")
        yield branch_in(block, "narrow")


def test_an_adapter_may_be_added(monkeypatch):
    assert recognise(Pair) is None
    monkeypatch.setattr("acnet_kernels.adapters.ADAPTERS", [*ADAPTERS, PairAdapter()])
    prove(Pair(4), SHAPE)
    folded = ak.fuse(nn.Sequential(Pair(4)).eval())
    assert [type(m) for m in folded[0]] == [nn.Conv2d, nn.ReLU]


class Wrong(PairAdapter):
    def finish(self, block, out, x):
        return out * float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: setattr(a, "after", ()), "auto, train: out: error"),
        (lambda a: setattr(a, "__class__", Wrong), "auto, train: out: error nan"),
        (
            lambda a: setattr(a, "branches", lambda block: [branch_in(block, "wide")]),
            "on one side alone: .*narrow.bn.weight",
        ),
        (lambda a: setattr(a, "reads", frozenset()), "it is not accelerated: its forward is not a known Pair's"),
    ],
)
def test_a_proof_finds_what_is_wrong(monkeypatch, change, words):
    adapter = PairAdapter()
    change(adapter)
    monkeypatch.setattr("acnet_kernels.adapters.ADAPTERS", [adapter])
    with pytest.raises(AssertionError, match=words):
        prove(Pair(4), SHAPE)
