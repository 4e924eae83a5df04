"""What is done to a block's submodules has its effect, whatever computes the step: compared with calling them."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize, prune

import acnet_kernels as ak
from acnet_kernels import ACBlock
from acnet_kernels.backends import planner
from tests.oracle import rel, scramble

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


class Plain(nn.Module):
    """A block's six modules called one by one, cropped as the original code crops."""

    def __init__(self, block: ACBlock, crop: int = 0) -> None:
        super().__init__()
        self.block, self.crop = block, crop

    def forward(self, x: Tensor) -> Tensor:
        b, c = self.block, self.crop
        square = b.square_bn(b.square_conv(x))
        ver = b.ver_bn(b.ver_conv(x[:, :, :, c : x.shape[3] - c]))
        hor = b.hor_bn(b.hor_conv(x[:, :, c : x.shape[2] - c]))
        return square + hor + ver


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation inside, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Adapting(nn.BatchNorm2d):
    """Normalises by the batch in eval too, as test-time adaptation does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class BatchNormXd(_BatchNorm):
    """What undoing a SyncBatchNorm conversion leaves behind."""

    def _check_input_dim(self, x: Tensor) -> None:
        return None


class FrozenBatchNorm2d(nn.Module):
    """As detectron2 writes it, with buffers named as nn.BatchNorm2d's."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((features,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + bias[:, None, None]


class LoRA(nn.Module):
    """A convolution with a low-rank addition."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 1, 1, conv.stride)
        self.up = nn.Conv2d(1, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


def convs(b: ACBlock) -> list[nn.Conv2d]:
    return [b.square_conv, b.ver_conv, b.hor_conv]


def swap_norms(b: ACBlock, make: Callable[[int], nn.Module]) -> None:
    for name in ("square_bn", "ver_bn", "hor_bn"):
        old = getattr(b, name)
        new = make(old.num_features)
        new.load_state_dict(old.state_dict(), strict=False)
        setattr(b, name, new)


def strides(b: ACBlock) -> None:
    for conv in convs(b):
        conv.stride = (1, 1)


def dilated_and_padded(b: ACBlock) -> None:
    b.square_conv.dilation = b.square_conv.padding = (2, 2)
    b.ver_conv.dilation, b.ver_conv.padding = (2, 1), (2, 0)
    b.hor_conv.dilation, b.hor_conv.padding = (2, 2), (0, 2)  # its one row is dilated in name only


def only_square_dilated(b: ACBlock) -> None:
    b.square_conv.dilation = b.square_conv.padding = (2, 2)


def circular(b: ACBlock) -> None:
    for conv in convs(b):
        conv.padding_mode = "circular"


def one_circular(b: ACBlock) -> None:
    b.hor_conv.padding_mode = "circular"


def padded_anew_in_a_mode(b: ACBlock) -> None:
    circular(b)  # what nn.Conv2d pads by in such a mode was set when it was built
    b.square_conv.padding, b.ver_conv.padding, b.hor_conv.padding = (2, 2), (2, 1), (1, 2)


def own_conv_forward(b: ACBlock) -> None:
    def tiled(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.padding
        x = F.pad(x, (columns, columns, rows, rows), "circular")
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    for conv in convs(b):
        conv._conv_forward = types.MethodType(tiled, conv)


def own_forward(b: ACBlock) -> None:
    forward = b.ver_bn.forward
    b.ver_bn.forward = lambda x: 2 * forward(x)


def offloaded(b: ACBlock) -> None:
    """Every parameter on meta, put in its place while its module runs."""
    for module in [*convs(b), b.square_bn, b.ver_bn, b.hor_bn]:
        real = dict(module.named_parameters())
        for name, parameter in real.items():
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta")))

        def run(x: Tensor, module: nn.Module = module, real: dict[str, Tensor] = real) -> Tensor:
            return torch.func.functional_call(copy_of(module), real, x)

        def copy_of(module: nn.Module) -> nn.Module:
            bare = copy.copy(module)
            bare.__dict__ = {k: v for k, v in module.__dict__.items() if k != "forward"}
            return bare

        module.forward = run


def pruned_conv(b: ACBlock) -> None:
    prune.l1_unstructured(b.square_conv, "weight", 0.5)
    with torch.no_grad():
        b.square_conv.weight_orig.mul_(2)  # an optimizer's step: the product is stale


def pruned_norm(b: ACBlock) -> None:
    prune.l1_unstructured(b.square_bn, "weight", 0.5)
    with torch.no_grad():
        b.square_bn.weight_orig.mul_(2)


def weight_norm_hook(b: ACBlock) -> None:
    nn.utils.weight_norm(b.hor_conv)
    with torch.no_grad():
        b.hor_conv.weight_g.mul_(2)


def weight_norm(b: ACBlock) -> None:
    parametrizations.weight_norm(b.hor_conv)


def spectral_norm_hook(b: ACBlock) -> None:
    nn.utils.spectral_norm(b.square_conv)
    with torch.no_grad():
        b.square_conv.weight_orig.mul_(2)


def spectral_norm(b: ACBlock) -> None:
    parametrizations.spectral_norm(b.square_conv)


class Doubled(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2 * t


def parametrized_norm(b: ACBlock) -> None:
    parametrize.register_parametrization(b.ver_bn, "weight", Doubled())


def zeroing_hook(b: ACBlock) -> None:
    b.ver_bn.register_forward_hook(lambda module, args, out: 0 * out)


def zeroing_pre_hook(b: ACBlock) -> None:
    b.ver_conv.register_forward_pre_hook(lambda module, args: (0 * args[0],))


def act_norm(b: ACBlock) -> None:
    swap_norms(b, NormAct)


def adapting_norm(b: ACBlock) -> None:
    swap_norms(b, Adapting)


def unsynced_norm(b: ACBlock) -> None:
    swap_norms(b, BatchNormXd)


def frozen_norm(b: ACBlock) -> None:
    swap_norms(b, FrozenBatchNorm2d)


def torchvision_frozen_norm(b: ACBlock) -> None:
    swap_norms(b, torchvision.ops.FrozenBatchNorm2d)


def group_norm(b: ACBlock) -> None:
    b.hor_bn = nn.GroupNorm(2, 6)


def lora(b: ACBlock) -> None:
    b.square_conv = LoRA(b.square_conv)


def fewer_channels(b: ACBlock) -> None:
    """Two output channels cut out, as structural pruning does, with and without the attributes that say so."""
    keep = [0, 2, 3, 5]
    for conv in convs(b):
        conv.weight = nn.Parameter(conv.weight.detach()[keep])
    b.square_conv.out_channels = 4
    for bn in (b.square_bn, b.ver_bn, b.hor_bn):
        bn.weight, bn.bias = (nn.Parameter(t.detach()[keep]) for t in (bn.weight, bn.bias))
        bn.running_mean, bn.running_var = bn.running_mean[keep], bn.running_var[keep]
        bn.num_features = 4


def counted_in_floats(b: ACBlock) -> None:
    for bn in (b.square_bn, b.hor_bn):
        bn.num_batches_tracked = bn.num_batches_tracked.float()


def strided_norms(b: ACBlock) -> None:
    """γ, β and running statistics that are views into one shared tensor."""
    for bn in (b.square_bn, b.hor_bn):
        shared = torch.stack([bn.weight.detach(), bn.bias.detach(), bn.running_mean, bn.running_var], 1)
        bn.weight, bn.bias = nn.Parameter(shared[:, 0]), nn.Parameter(shared[:, 1])
        bn.running_mean, bn.running_var = shared[:, 2], shared[:, 3]


def counted_in_int32(b: ACBlock) -> None:
    b.ver_bn.num_batches_tracked = b.ver_bn.num_batches_tracked.int()


def note(b: ACBlock) -> None:
    b.square_conv.comment = "an attribute that no forward reads"


# What is done → (arguments of the block, whether it folds).
FAULTS: dict[Callable[[ACBlock], None], tuple[dict[str, object], bool]] = {
    strides: ({"stride": 2}, True),
    dilated_and_padded: ({}, True),
    only_square_dilated: ({}, False),
    circular: ({}, True),
    one_circular: ({}, False),
    padded_anew_in_a_mode: ({}, False),
    own_conv_forward: ({}, False),
    own_forward: ({}, False),
    offloaded: ({}, False),
    pruned_conv: ({}, True),
    pruned_norm: ({}, True),
    weight_norm_hook: ({}, True),
    weight_norm: ({}, True),
    spectral_norm_hook: ({}, True),
    spectral_norm: ({}, True),
    parametrized_norm: ({}, True),
    zeroing_hook: ({}, False),
    zeroing_pre_hook: ({}, False),
    act_norm: ({}, False),
    adapting_norm: ({}, False),
    unsynced_norm: ({}, True),
    frozen_norm: ({}, True),
    torchvision_frozen_norm: ({}, True),
    group_norm: ({}, False),
    lora: ({}, False),
    fewer_channels: ({}, True),
    counted_in_floats: ({}, True),
    counted_in_int32: ({}, True),
    strided_norms: ({}, True),
    note: ({}, True),
}
CASES = [pytest.param(fault, *how, id=fault.__name__) for fault, how in FAULTS.items()]


def broken(fault: Callable[[ACBlock], None], arguments: dict[str, object], backend: str = "auto") -> ACBlock:
    torch.manual_seed(0)
    block = scramble(ACBlock(4, 6, 3, **{"padding": 1, "backend": backend, **arguments}))
    fault(block)
    return block


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.named_buffers() if not name.endswith(("_u", "_v"))}


@pytest.mark.parametrize("backend", planner.CHOICES)
@pytest.mark.parametrize(("fault", "arguments", "folds"), CASES)
def test_a_step_is_what_the_submodules_compute(fault, arguments, folds, backend):
    block = broken(fault, arguments, backend)
    plain = Plain(broken(fault, arguments))
    torch.manual_seed(1)
    x = torch.randn(3, 4, 9, 8)
    for training in (True, False):
        block.train(training), plain.train(training)
        mine, other = (x.clone().requires_grad_() for _ in range(2))
        got, want = block(mine), plain(other)
        assert rel(got, want) < 1e-5
        g = torch.randn_like(want)
        got.backward(g)
        want.backward(g)
        assert rel(mine.grad, other.grad) < 1e-5
        assert_alike_gradients(block, plain.block)
        found, expected = state(block), state(plain.block)
        assert found.keys() == expected.keys()
        for name, t in expected.items():
            assert found[name].dtype == t.dtype
            assert rel(found[name], t) < 1e-5, name


def assert_alike_gradients(block: ACBlock, other: ACBlock) -> None:
    expected = dict(other.named_parameters())
    for name, parameter in block.named_parameters():
        want = expected[name].grad
        if want is None or parameter.grad is None:
            assert want is parameter.grad, name
            continue
        # Of the size of the terms that cancel: under a batch norm a weight's gradient has no part along it.
        scale = max(want.norm(), 1e-3 * sum(p.grad.norm() for p in expected.values() if p.grad is not None))
        assert (parameter.grad - want).norm() <= 1e-4 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("fault", [strides, circular, own_forward, pruned_conv, zeroing_hook, unsynced_norm])
def test_a_compiled_step_is_one_graph(fault):
    torch.compiler.reset()
    arguments, _ = FAULTS[fault]
    compiled = torch.compile(broken(fault, arguments), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 9, 8)
    assert rel(compiled(x), Plain(broken(fault, arguments))(x)) < 1e-5


@pytest.mark.parametrize(("fault", "arguments", "folds"), CASES)
def test_a_fold_is_right_or_refuses(fault, arguments, folds):
    x = torch.randn(3, 4, 9, 8)
    block = broken(fault, arguments)
    before = block._modules.copy()
    if not folds:
        for refuses in (
            lambda: ak.fold(block),
            lambda: ak.fuse(nn.Sequential(block).eval(), inplace=True),
            lambda: block.eval().switch_to_deploy(),
            block.get_equivalent_kernel_bias,
        ):
            with pytest.raises(ValueError, match=r"cannot fold: (square|ver|hor)_(conv|bn)"):
                refuses()
        assert block._modules == before
        return
    plain = Plain(broken(fault, arguments)).eval()
    want = plain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the block is in train mode: its fold is eval's all the same
        trained = ak.fuse(nn.Sequential(block.train()))
    assert rel(trained(x), want) < 1e-5
    block.eval()
    assert rel(ak.fuse(nn.Sequential(block))(x), want) < 1e-5
    weight, bias = block.get_equivalent_kernel_bias()
    geometry = block.geometry
    assert weight.shape == (block.out_channels, 4, 3, 3)
    padded = geometry.pad_input(x)
    assert rel(F.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation), want) < 1e-5
    block.switch_to_deploy()
    assert rel(block(x), want) < 1e-5


@pytest.mark.parametrize("shape", [None, (3, 4, 9, 8)])
@pytest.mark.parametrize(("fault", "arguments", "folds"), CASES)
def test_explain_never_raises(fault, arguments, folds, shape):
    for training in (True, False):
        net = nn.Sequential(broken(fault, arguments)).train(training)
        text = str(ak.explain(net, None if shape is None else torch.randn(shape)))
        assert "0 " in text


def test_explain_says_why_the_submodules_run():
    reasons = {
        fault.__name__: broken(fault, arguments).module_path_reason() for fault, (arguments, _) in FAULTS.items()
    }
    assert reasons["strides"] is reasons["circular"] is reasons["fewer_channels"] is reasons["frozen_norm"] is None
    assert reasons["only_square_dilated"].startswith("hor_conv's padding is (0, 1)")
    assert reasons["own_conv_forward"] == "square_conv has a _conv_forward of its own"
    assert reasons["own_forward"] == "ver_bn has a forward of its own"
    assert reasons["zeroing_hook"] == "ver_bn has hooks"
    assert reasons["act_norm"] == "square_bn is a NormAct, not a plain nn.BatchNorm2d"
    assert reasons["lora"] == "square_conv is a LoRA, not a plain nn.Conv2d"
    for fault, (arguments, _) in FAULTS.items():
        row = ak.explain(nn.Sequential(broken(fault, arguments))).blocks[0]
        reason = reasons[fault.__name__]
        assert reason is None or row.reason == f"through the submodules: {reason}"


def test_settings_of_the_block_move_every_branch():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12, 12)
    block = scramble(ACBlock(4, 6, 3, stride=2, padding=1))
    wanted = ACBlock(4, 6, 3, padding=2, dilation=2, padding_mode="circular")
    wanted.load_state_dict(block.state_dict())
    block.stride = 1
    block.dilation, block.padding = (2, 2), 2
    block.padding_mode = "circular"
    assert (block.stride, block.padding, block.dilation, block.padding_mode) == ((1, 1), (2, 2), (2, 2), "circular")
    assert block.module_path_reason() is None
    assert rel(block(x), wanted(x)) < 1e-6
    assert rel(block.eval()(x), wanted.eval()(x)) < 1e-6
    block.switch_to_deploy()
    block.padding_mode = "zeros"
    block.stride = 3
    assert block.fused_conv.stride == (3, 3)
    assert block(x).shape == (2, 6, 4, 4)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        block.stride = 0
    assert block.stride == (3, 3)
    with pytest.raises(AttributeError):
        block.groups = 2


def test_cropped_branches_obey_too():
    """Without padding hor and ver see a cropped input, whatever their strides become."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 11, 10)
    block = scramble(ACBlock(4, 6, 3, stride=2))
    strides(block)
    for training in (True, False):
        plain = Plain(copy.deepcopy(block), crop=1).train(training)
        assert rel(block.train(training)(x), plain(x)) < 1e-5
    assert rel(ak.fuse(block)(x), block(x)) < 1e-5


def test_a_stride_of_one_branch_alone_is_an_error():
    block = ACBlock(4, 6, 3, stride=2, padding=1)
    block.square_conv.stride = (1, 1)
    with pytest.raises(ValueError, match="the branches' maps must have one shape to be summed: square's is"):
        block(torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("backend", planner.CHOICES)
@pytest.mark.parametrize("training", [True, False])
def test_one_branch_of_fewer_channels_does_not_broadcast(backend, training):
    b = ACBlock(4, 6, 3, padding=1, backend=backend)
    b.hor_conv.weight = nn.Parameter(b.hor_conv.weight.detach()[:1])
    b.hor_bn = nn.BatchNorm2d(1)
    with pytest.raises(ValueError, match=r"one shape to be summed: square's is \(2, 6, 5, 5\), hor's \(2, 1,"):
        b.train(training)(torch.randn(2, 4, 5, 5))
    assert "hor_conv's weight is (1, 4, 1, 3), not (6, 4, 1, 3)" in b.module_path_reason()


def test_depthwise_channels_cut_out():
    block = scramble(ACBlock(6, 6, 3, padding=1, groups=6))
    keep = [0, 2, 3]
    for conv in convs(block):
        conv.weight = nn.Parameter(conv.weight.detach()[keep])
        conv.in_channels = conv.out_channels = conv.groups = 3
    for bn in (block.square_bn, block.ver_bn, block.hor_bn):
        bn.weight, bn.bias = (nn.Parameter(t.detach()[keep]) for t in (bn.weight, bn.bias))
        bn.running_mean, bn.running_var = bn.running_mean[keep], bn.running_var[keep]
    x = torch.randn(2, 3, 7, 8)
    assert (block.in_channels, block.out_channels, block.groups) == (3, 3, 3)
    assert rel(block(x), Plain(copy.deepcopy(block))(x)) < 1e-5
    want = Plain(block.eval())(x)
    fused = ak.fuse(block)
    assert (fused.in_channels, fused.out_channels, fused.groups) == (3, 3, 3)
    assert rel(block(x), want) < 1e-5
    assert rel(fused(x), want) < 1e-5


def test_spectral_norm_is_folded_without_a_power_iteration():
    for fault in (spectral_norm, spectral_norm_hook):
        block = broken(fault, {}).train()
        before = {name: t.clone() for name, t in block.named_buffers()}
        ak.fold(block)
        assert all(torch.equal(t, before[name]) for name, t in block.named_buffers())
        assert all(module.training for module in block.modules())
