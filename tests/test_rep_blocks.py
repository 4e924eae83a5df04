"""RepVGGBlock and MobileOneBlock: the original code's names, and everything an ACBlock can do."""

import copy
import pickle
import re

import oracle
import pytest
import torch
from oracle import rel
from timm.utils.model import reparameterize_model
from torch import nn

import acnet_kernels as ak
from acnet_kernels import MobileOneBlock, RepVGGBlock

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BACKENDS = ("auto", "eager", "branches", "moments", "recompute", "memory_saver")
BLOCKS = {
    "repvgg": lambda **o: RepVGGBlock(6, 6, 3, padding=1, **o),
    "repvgg of stride 2": lambda **o: RepVGGBlock(4, 6, 3, stride=2, padding=1, groups=2, **o),
    "mobileone": lambda **o: MobileOneBlock(6, 6, 3, padding=1, groups=6, num_conv_branches=4, **o),
    "repvgg with se": lambda **o: RepVGGBlock(16, 16, 3, 1, 1, use_se=True, **o),
    "mobileone with se": lambda **o: MobileOneBlock(32, 32, 3, 2, 1, groups=32, use_se=True, **o),
    "mobileone pointwise": lambda **o: MobileOneBlock(6, 8, 1, num_conv_branches=2, **o),
}


def names(*modules: str) -> list[str]:
    return [f"{m}.{p}" for m in modules for p in (("weight",) if m.endswith("conv") else BN)]


@pytest.mark.parametrize(
    ("name", "keys", "deployed"),
    [
        (
            "repvgg",
            names("rbr_identity", "rbr_dense.conv", "rbr_dense.bn", "rbr_1x1.conv", "rbr_1x1.bn"),
            "rbr_reparam",
        ),
        (
            "repvgg of stride 2",
            names("rbr_dense.conv", "rbr_dense.bn", "rbr_1x1.conv", "rbr_1x1.bn"),
            "rbr_reparam",
        ),
        (
            "mobileone",
            [
                *names("rbr_skip"),
                *(key for i in range(4) for key in names(f"rbr_conv.{i}.conv", f"rbr_conv.{i}.bn")),
                *names("rbr_scale.conv", "rbr_scale.bn"),
            ],
            "reparam_conv",
        ),
        (
            "mobileone pointwise",
            [key for i in range(2) for key in names(f"rbr_conv.{i}.conv", f"rbr_conv.{i}.bn")],
            "reparam_conv",
        ),
    ],
)
def test_state_dicts_are_the_original_codes(name, keys, deployed):
    block = BLOCKS[name]().eval()
    assert list(block.state_dict()) == keys
    block.switch_to_deploy()
    assert list(block.state_dict()) == [f"{deployed}.weight", f"{deployed}.bias"]
    built = BLOCKS[name](**{"deploy" if "vgg" in name else "inference_mode": True})
    built.load_state_dict(block.state_dict())


def modules(block, x):
    """The block's submodules called one by one."""
    if isinstance(block, RepVGGBlock):
        branches, skip, after = [block.rbr_dense, block.rbr_1x1], block.rbr_identity, block.nonlinearity
    else:
        scale = [] if block.rbr_scale is None else [block.rbr_scale]
        branches, skip, after = [*block.rbr_conv, *scale], block.rbr_skip, block.activation
    out = sum(branch(x) for branch in branches if branch is not None)
    out = out if skip is None else out + skip(x)
    return after(block.se(out))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_modules(name, backend):
    block = oracle.scramble(BLOCKS[name](backend=backend))
    x = torch.randn(3, block.in_channels, 9, 8)
    grad = torch.randn(block(x).shape)
    got, want = oracle.run(block, x, grad), oracle.run(block, x, grad, modules)
    true = oracle.run(copy.deepcopy(block).double(), x.double(), grad.double(), modules)
    scale = getattr(block, "rbr_scale", None)
    if scale is not None and scale.conv.weight[0].numel() == 1:
        oracle.judge_on_its_terms(
            "rbr_scale.conv.weight", scale.conv.weight, true["rbr_scale.bn.weight"], got, want, true
        )
    oracle.assert_as_good_as(got, want, true)
    twin = copy.deepcopy(block)
    block(x), modules(twin, x)
    for a, e in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, e)
    block.eval(), twin.eval()
    assert rel(block(x), modules(twin, x)) < 1e-5
    for folded in (ak.fuse(block), reparameterize_model(block), pickle.loads(pickle.dumps(block))):
        assert rel(folded(x), modules(twin, x)) < 1e-5
    block.reparameterize()
    assert block.deploy
    assert sum(isinstance(m, nn.BatchNorm2d) for m in block.modules()) == 0
    assert rel(block(x), modules(twin, x)) < 1e-5


def test_squeeze_and_excitation_has_the_original_codes_names():
    block = BLOCKS["repvgg with se"]()
    assert list(block.state_dict())[:4] == ["se.down.weight", "se.down.bias", "se.up.weight", "se.up.bias"]
    assert block.se.down.weight.shape == (1, 16, 1, 1)
    other = BLOCKS["mobileone with se"]()
    assert list(other.state_dict())[:4] == [
        "se.reduce.weight",
        "se.reduce.bias",
        "se.expand.weight",
        "se.expand.bias",
    ]
    x = torch.randn(2, 16, 5, 4)
    weights = torch.sigmoid(block.se.up(torch.relu(block.se.down(torch.nn.functional.adaptive_avg_pool2d(x, 1)))))
    assert rel(block.se(x), x * weights) < 1e-6


@pytest.mark.parametrize("name", BLOCKS)
def test_explain_and_autocast_and_layouts(name):
    block = BLOCKS[name](backend="branches").to(memory_format=torch.channels_last)
    x = torch.randn(2, block.in_channels, 8, 8).to(memory_format=torch.channels_last)
    assert ak.explain(block, x).blocks[0].backend == "branches"
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def zeroed(module, args, out):
    return out * 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.rbr_dense.register_forward_hook(zeroed), "a branch's container has hooks"),
        (lambda b: b.rbr_1x1.conv.register_forward_hook(zeroed), "rbr_1x1.conv has hooks"),
        (lambda b: setattr(b, "rbr_identity", nn.GroupNorm(2, 6)), "rbr_identity is a GroupNorm"),
        (lambda b: b.rbr_dense.append(nn.Dropout(1.0)), r"container holds \('conv', 'bn', '2'\)"),
        (lambda b: setattr(b, "rbr_dense", nn.Sequential(*b.rbr_dense)), "it has no rbr_dense.conv"),
        (lambda b: setattr(b, "rbr_identity", None), "it has no rbr_identity"),
        (lambda b: setattr(b, "rbr_dense", None), "it has no rbr_dense.conv"),
        (lambda b: setattr(b.rbr_1x1.conv, "stride", (2, 2)), None),
    ],
)
def test_what_is_done_to_a_submodule_has_its_effect(change, reason):
    block = BLOCKS["repvgg"](backend="branches")
    change(block)
    x = torch.randn(2, 6, 8, 8)
    if reason is None:  # the maps do not fit together any more
        with pytest.raises(ValueError, match="the branches' maps must have one shape to be summed"):
            block(x)
        return
    assert re.search(reason, block.module_path_reason())
    assert rel(block(x), modules(copy.deepcopy(block), x)) < 1e-6
    assert ak.explain(block, x).blocks[0].backend == "eager"
    with pytest.raises(ValueError, match="cannot fold"):
        ak.fuse(block.eval())


def test_a_setting_moves_all_branches():
    block = RepVGGBlock(6, 6, 3, padding=1, backend="branches")
    block.padding_mode = "reflect"
    assert block.rbr_1x1.conv.padding_mode == block.rbr_dense.conv.padding_mode == "reflect"
    x = torch.randn(2, 6, 8, 8)
    assert rel(block(x), modules(copy.deepcopy(block), x)) < 1e-5


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RepVGGBlock(4.5, 6, 3), TypeError, "in_channels must be an int"),
        (
            lambda: RepVGGBlock(4, 6, 3, groups=4),
            ValueError,
            "out_channels must be a positive multiple of groups=4",
        ),
        (
            lambda: RepVGGBlock(4, 6, (3, 2)),
            ValueError,
            r"kernel_size must be odd, for a 1×1 branch .* got \(3, 2\)",
        ),
        (lambda: RepVGGBlock(4, 6, 3, use_se=True), ValueError, "use_se needs out_channels of 16 at least, got 6"),
        (
            lambda: MobileOneBlock(4, 6, 3, num_conv_branches=0),
            ValueError,
            "num_conv_branches must be 1 to 6, got 0",
        ),
        (
            lambda: MobileOneBlock(4, 6, 3, num_conv_branches=7),
            ValueError,
            "num_conv_branches must be 1 to 6, got 7",
        ),
        (lambda: MobileOneBlock(4, 6, 3, backend="fast"), ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_an_original_5x5_layer_has_lines_of_three():
    block = oracle.scramble(ak.ACBlock(4, 6, 5, padding=2, line_size=3, backend="branches"))
    assert block.hor_conv.weight.shape == (6, 4, 1, 3)
    assert block.hor_conv.padding == (0, 1)
    assert block.ver_conv.padding == (1, 0)
    x, grad = torch.randn(2, 4, 9, 8), torch.randn(2, 6, 9, 8)
    plain = oracle.run(
        block, x, grad, lambda b, t: sum(getattr(b, f"{n}_bn")(getattr(b, f"{n}_conv")(t)) for n in b.branches)
    )
    oracle.assert_as_good_as(oracle.run(block, x, grad), plain, oracle.truth(block, x, grad))
    assert "line_size=3" in repr(block)
