"""ACBlock: the original's semantics, every constructor argument, and what users of it have reported."""

import copy
import io
import itertools
import pickle
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import rel, scramble
from torch import nn
from torch.nn.utils import prune

from acnet_kernels import ACBlock, explain, fuse
from acnet_kernels.backends import planner


def block(c=4, k=6, kernel=3, **options):
    return scramble(ACBlock(c, k, kernel, **options))


def layouts(x):
    return {"NCHW": x, "channels_last": x.to(memory_format=torch.channels_last)}


# --- the definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["branch", "sum"])
@pytest.mark.parametrize("branches", [("square",), ("square", "hor"), ("square", "ver"), ("square", "hor", "ver")])
def test_against_the_reference(branches, norm, training):
    b = block(padding=1, branches=branches, norm=norm).train(training)
    x, grad = torch.randn(3, 4, 9, 7), torch.randn(3, 6, 9, 7)
    true = oracle.truth(b, x, grad)
    eager = oracle.run(b, x, grad, lambda m, t: m._forward_modules(t))
    for name, layout in layouts(x).items():
        got = oracle.run(b, layout, grad)
        oracle.assert_as_good_as(got, eager, true)
        assert got["out"].is_contiguous(memory_format=torch.channels_last) == (name == "channels_last")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_geometry_reaches_every_path(mode):
    for k, s, p, d, groups, shift in [
        (3, 1, 0, 1, 1, (0, 0)),
        (5, 1, 1, 1, 2, (0, 0)),
        (5, 2, 0, 1, 1, (0, 0)),
        (3, 2, 2, 2, 4, (0, 0)),
        (3, 1, 1, 2, 1, (1, 1)),
        (5, 1, 3, 1, 1, (-2, 1)),
    ]:
        b = block(4, 8, k, stride=s, padding=p, dilation=d, groups=groups, padding_mode=mode, shift=shift)
        x = torch.randn(2, 4, 13, 11)
        for training in (True, False):
            b.train(training)
            want = oracle.reference_block(copy.deepcopy(b).double(), x.double())
            assert rel(copy.deepcopy(b)(x), want) < 1e-6
            assert rel(copy.deepcopy(b)._forward_modules(x), want) < 1e-6
        b.switch_to_deploy()
        assert rel(b(x), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pure_low_and_double_precision(dtype):
    b = block(padding=1)
    x, grad = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 6, 8, 8, dtype=dtype)
    b = b.to(dtype)
    for training in (True, False):
        b.train(training)
        eager = oracle.run(b, x, grad, lambda m, t: m._forward_modules(t))
        oracle.assert_as_good_as(oracle.run(b, x, grad), eager, oracle.truth(b, x, grad))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, training):
    b = block(padding=1).train(training)
    x, grad = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)

    def cast(forward):
        def call(m, t):
            with torch.autocast("cpu", dtype):
                return forward(m, t)

        return call

    got = oracle.run(b, x, grad, cast(lambda m, t: m(t)))
    eager = oracle.run(b, x, grad, cast(lambda m, t: m._forward_modules(t)))
    assert got["out"].dtype == eager["out"].dtype == dtype
    assert got["square_conv.weight"].dtype == torch.float32
    oracle.assert_as_good_as(got, eager, oracle.truth(b, x, grad))


def test_batch_norms_in_float32_around_half_convolutions():
    b = block(padding=1).to(torch.bfloat16)
    for bn in b.norms().values():
        bn.float()
    x = torch.randn(2, 4, 8, 8).to(torch.bfloat16)
    for training in (True, False):
        b.train(training)
        assert b(x).dtype == torch.bfloat16
    weight, bias = b.get_equivalent_kernel_bias()
    assert weight.dtype == bias.dtype == torch.bfloat16


def test_running_statistics_are_batch_norms_own():
    for momentum, backend in itertools.product((0.1, 0.7, None), ("auto", "eager")):
        b = ACBlock(4, 6, 3, padding=1, momentum=momentum, backend=backend)
        twin = copy.deepcopy(b)
        for _ in range(3):
            x = torch.randn(5, 4, 6, 6) + 2
            b(x)
            twin._forward_modules(x)
        for (name, got), want in zip(b.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(got, want, msg=f"{name} momentum={momentum}")
        assert all(int(bn.num_batches_tracked) == 3 for bn in b.norms().values())


def test_train_and_eval_differ_and_eval_is_one_convolution():
    b = block(padding=1)
    x = torch.randn(2, 4, 8, 8)
    assert rel(b.train()(x), b.eval()(x)) > 1e-2
    assert b.plan(x)[1].backend.NAME == "folded"
    calls = []
    original = F.conv2d
    try:
        F.conv2d = lambda *a, **k: calls.append(1) or original(*a, **k)
        b(x)
    finally:
        F.conv2d = original
    assert len(calls) == 1


def test_constant_input_gives_beta():
    b = block(padding=0)
    out = b(torch.full((2, 4, 6, 6), 3.0))
    want = sum(bn.bias for bn in b.norms().values())
    torch.testing.assert_close(out, want[:, None, None].expand_as(out), rtol=1e-4, atol=1e-3)


def test_large_mean_small_deviation():
    b = block(padding=0)
    x = torch.randn(8, 4, 10, 10) * 0.1 + 1e3
    grad = torch.randn(8, 6, 8, 8)
    eager = oracle.run(b, x, grad, lambda m, t: m._forward_modules(t))
    oracle.assert_as_good_as(oracle.run(b, x, grad), eager, oracle.truth(b, x, grad))


# --- the constructor and the state dict -----------------------------------------------------------------


def test_state_dict_is_the_originals():
    def bn(name):
        return [f"{name}.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    want = [
        "square_conv.weight",
        *bn("square_bn"),
        "ver_conv.weight",
        "hor_conv.weight",
        *bn("ver_bn"),
        *bn("hor_bn"),
    ]
    assert list(ACBlock(2, 2, 3).state_dict()) == want
    assert list(ACBlock(2, 2, 3, deploy=True).state_dict()) == ["fused_conv.weight", "fused_conv.bias"]
    kept = list(ACBlock(2, 2, 3, norm="sum", branches=("square", "ver")).state_dict())
    assert kept == ["square_conv.weight", "ver_conv.weight", *bn("bn")]


def test_gammas():
    assert all((bn.weight == 1 / 3).all() for bn in ACBlock(2, 2, 3, reduce_gamma=True).norms().values())
    assert all((bn.weight == 0.5).all() for bn in ACBlock(2, 2, 3, gamma_init=0.5).norms().values())
    b = ACBlock(2, 2, 3, use_affine=False)
    assert not list(b.square_bn.parameters())
    with pytest.raises(ValueError, match="no γ to set"):
        b.init_gamma(1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce_gamma": True, "gamma_init": 0.5}, "reduce_gamma or gamma_init"),
        ({"use_affine": False, "reduce_gamma": True}, "use_affine"),
        ({"use_affine": False, "gamma_init": 1.0}, "use_affine"),
        ({"branches": ("hor", "ver")}, "branches must be a subset"),
        ({"branches": ("square", "diagonal")}, "branches must be a subset"),
        ({"branches": "square"}, "branches must be a subset"),
        ({"norm": "layer"}, "norm must be"),
        ({"backend": "magic"}, "backend must be one of"),
        ({"groups": 3}, "in_channels must be a positive multiple of groups=3"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        ACBlock(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})


def test_wrong_inputs():
    b = ACBlock(4, 6, 3)
    with pytest.raises(ValueError, match="4 channels, got 5"):
        b(torch.randn(1, 5, 8, 8))
    with pytest.raises(ValueError, match="4-D"):
        b(torch.randn(4, 8, 8))
    with pytest.raises(ValueError, match="output would be empty"):
        b(torch.randn(1, 4, 2, 8))
    assert int(b.square_bn.num_batches_tracked) == 0


def test_reads_like_a_conv2d():
    b = ACBlock(4, 6, 3, 2, 1, 2, 2)
    conv = nn.Conv2d(4, 6, 3, 2, 1, 2, 2)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(b, name) == getattr(conv, name)
    assert "4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2), groups=2" in repr(b)
    assert "norm='sum'" in repr(ACBlock(2, 2, 3, norm="sum", shift=(1, 1), branches=("square", "hor"), deploy=True))


def test_numpys_sizes_and_the_inputs_name_as_conv2d():
    b = ACBlock(np.int64(4), np.int32(6), np.int64(3), padding=np.int64(1), groups=np.int64(2))
    assert repr(b) == repr(ACBlock(4, 6, 3, padding=1, groups=2))
    with pytest.raises(TypeError, match=r"in_channels must be an int, got 4\.0"):
        ACBlock(4.0, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    for module in (b.eval(), fuse(b)):
        assert torch.equal(module(input=x), module(x))


# --- folding ----------------------------------------------------------------------------------------------


def test_fold_with_conv_biases_and_own_eps():
    b = block(padding=1)
    for i, conv in enumerate(b.convs().values()):
        conv.bias = nn.Parameter(torch.randn(6) * 10**i)  # up to 100: large against the maps
    for eps, bn in zip((1e-5, 1e-3, 0.5), b.norms().values(), strict=True):
        bn.eps = eps
    x = torch.randn(2, 4, 8, 8)
    want = oracle_eval(b, x)
    b.eval()
    assert rel(b(x), want) < 1e-6
    b.switch_to_deploy()
    assert rel(b(x), want) < 1e-6


def oracle_eval(b, x):
    """Through the submodules, in float64."""
    return copy.deepcopy(b).double().eval()._forward_modules(x.double())


@pytest.mark.parametrize("options", [{"groups": 4}, {"groups": 2}, {"use_affine": False}, {"norm": "sum"}])
def test_folds_exactly(options):
    b = block(4, 8, padding=1, **options).eval()
    x = torch.randn(2, 4, 8, 8)
    want = oracle_eval(b, x)
    b.switch_to_deploy()
    assert rel(b(x), want) < 1e-6
    assert b.fused_conv.groups == options.get("groups", 1)
    assert b.fused_conv.dilation == (1, 1)


def test_folding_half_weights_is_done_in_float32():
    b = block(64, 64, padding=1).eval()
    want = b.get_equivalent_kernel_bias()[0].double()
    half = copy.deepcopy(b).to(torch.bfloat16)
    exact = copy.deepcopy(half).double().get_equivalent_kernel_bias()[0]
    got = half.get_equivalent_kernel_bias()[0]
    assert (got == exact.to(torch.bfloat16)).float().mean() > 0.999  # rounded once, at the end
    assert rel(got, want) < 4e-3


def test_no_running_statistics_no_fold():
    b = ACBlock(4, 6, 3, padding=1)
    b.hor_bn = nn.BatchNorm2d(6, track_running_stats=False)
    x = torch.randn(2, 4, 8, 8)
    before = b.eval()(x)
    with pytest.raises(ValueError, match="hor_bn has track_running_stats=False"):
        b.switch_to_deploy()
    assert rel(b(x), before) < 1e-6


def test_second_switch_and_reload():
    b = block(padding=1).eval()
    x = torch.randn(2, 4, 8, 8)
    b.switch_to_deploy()
    weight = b.fused_conv.weight
    b.switch_to_deploy()
    assert b.fused_conv.weight is weight
    fresh = ACBlock(4, 6, 3, padding=1, deploy=True).eval()
    fresh.load_state_dict(b.state_dict())
    assert torch.equal(fresh(x), b(x))
    with pytest.raises(ValueError, match="deployed"):
        b.fold_step()


def test_deploy_keeps_what_it_can():
    b = block(padding=1).to(memory_format=torch.channels_last).double().eval()
    for p in b.parameters():
        p.requires_grad_(False)
    b.switch_to_deploy()
    assert b.fused_conv.weight.dtype == torch.float64
    assert not b.fused_conv.weight.requires_grad
    assert not b.fused_conv.training
    assert b.fused_conv.weight.is_contiguous(memory_format=torch.channels_last)
    b = block().eval()
    with torch.inference_mode():
        b.switch_to_deploy()
    b(torch.randn(1, 4, 5, 5)).sum().backward()
    assert b.fused_conv.weight.grad is not None


def test_warnings_of_deploy_and_train():
    b = block()
    with pytest.warns(UserWarning, match="train mode"):
        b.switch_to_deploy()
    b.eval()
    with pytest.warns(UserWarning, match=r"train\(\) on a deployed"):
        b.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block().eval().switch_to_deploy()


def test_single_init_starts_as_conv_and_bn():
    b = ACBlock(4, 6, 3, padding=1)
    b.single_init()
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
    plain[0].weight.data.copy_(b.square_conv.weight)
    x = torch.randn(2, 4, 8, 8)
    assert rel(b(x), plain(x)) < 1e-6


def test_equivalent_kernel_is_differentiable():
    b = block(padding=1).double().eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    true = oracle.truth(b, x, grad := torch.randn(2, 6, 5, 5, dtype=torch.float64))
    got = oracle.run(b, x, grad)
    for name, t in true.items():
        assert rel(got[name], t) < 1e-12, name


# --- life among other modules -----------------------------------------------------------------------------


def test_deepcopy_pickle_and_save_after_a_step():
    b = block(padding=1)
    x = torch.randn(2, 4, 8, 8)
    b(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(b, buffer)
    buffer.seek(0)
    want = b.eval()(x)
    for twin in (copy.deepcopy(b), pickle.loads(pickle.dumps(b)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin.eval()(x), want)


def test_frozen_stays_frozen():
    b = block(padding=1)
    for bn in b.norms().values():
        bn.eval()
        bn.weight.requires_grad_(False)
    b.hor_conv.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in b.named_buffers()}
    x = torch.randn(2, 4, 8, 8)
    assert b.plan(x)[1].backend.NAME == "folded"
    b(x).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in b.named_buffers())
    assert b.hor_conv.weight.grad is None
    assert b.square_bn.weight.grad is None
    assert b.square_conv.weight.grad is not None


def test_some_norms_frozen():
    b = block(padding=1)
    b.hor_bn.eval()
    twin = copy.deepcopy(b)
    x, grad = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)
    got = oracle.run(b, x, grad)
    want = oracle.run(twin, x, grad, lambda m, t: m._forward_modules(t))
    for name, t in want.items():
        assert rel(got[name], t) < 1e-5, name


def test_awkward_gradients_and_inputs():
    b = block(padding=1)
    base = torch.randn(2, 8, 9, 8)
    x = base[:, ::2, 1:, :]  # strided view
    b(x).sum().backward()  # sum() hands back a stride-0 gradient
    first = b.square_conv.weight.grad.clone()
    b.zero_grad()
    b(x).backward(torch.ones(2, 6, 8, 8).permute(0, 1, 3, 2))
    torch.testing.assert_close(b.square_conv.weight.grad, first, rtol=1e-3, atol=1e-4)
    y = F.relu(b(x), inplace=True)
    b.zero_grad()
    y.square().sum().backward()
    assert b.square_conv.weight.grad.isfinite().all()


def test_inplace_relu_after_the_block_matches():
    b = block(padding=1)
    x = torch.randn(2, 4, 8, 8)
    for training in (True, False):
        b.train(training)
        grads = []
        for inplace in (True, False):
            b.zero_grad()
            F.relu(b(x), inplace=inplace).square().sum().backward()
            grads.append(b.square_conv.weight.grad.clone())
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["eager", "branches", "moments", "recompute", "folded"])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_output_has_conv2ds_layout(backend, channels):
    """A map or kernel of one channel is dense in both layouts: its strides say which one it was converted to."""
    formats = (torch.contiguous_format, torch.channels_last)
    for x_format, weight_format in itertools.product(formats, repeat=2):
        x = torch.randn(3, channels, 6, 5).to(memory_format=x_format)
        conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False).to(memory_format=weight_format)
        b = ACBlock(channels, 4, 3, padding=1).to(memory_format=weight_format)
        b.train(backend != "folded")
        b.backend = "auto" if backend == "folded" else backend
        assert explain(b, x).blocks[0].backend == backend
        assert b(x).stride() == conv(x).stride()


def test_empty_batch_and_single_value_as_batch_norm():
    b, bn = ACBlock(4, 6, 3, padding=1), nn.BatchNorm2d(6)
    x = torch.randn(0, 4, 8, 8)
    for training in (True, False):
        b.train(training)
        bn.train(training)
        assert b(x).shape == bn(torch.randn(0, 6, 8, 8)).shape
    b = ACBlock(4, 6, 3, padding=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        b(torch.randn(1, 4, 1, 1))
    assert b.eval()(torch.randn(1, 4, 1, 1)).shape == (1, 6, 1, 1)


def test_module_path_when_a_submodule_is_special():
    x = torch.randn(2, 4, 8, 8)
    b = block(padding=1)
    seen = []
    b.ver_conv.register_forward_hook(lambda *_: seen.append(1))
    b(x)
    assert seen == [1]
    assert b.module_path_reason() == "ver_conv has hooks"

    b = block(padding=1)
    b.hor_bn = nn.Identity()
    assert b.module_path_reason() == "hor_bn is a Identity, not a plain nn.BatchNorm2d"
    with pytest.raises(ValueError, match="hor_bn is a Identity"):
        b.eval().switch_to_deploy()

    b = block(padding=1)
    nn.utils.parametrizations.weight_norm(b.square_conv)
    assert "square_conv is a Parametrized" in b.module_path_reason()
    b(x).sum().backward()
    assert b.square_conv.parametrizations.weight.original0.grad is not None
    want = b.eval()(x)
    b.switch_to_deploy()
    assert rel(b(x), want) < 1e-5

    assert block(norm="sum").module_path_reason() is None


def test_pruned_block_folds_its_current_mask():
    b = block(padding=1)
    prune.l1_unstructured(b.square_conv, "weight", 0.5)
    with torch.no_grad():
        b.square_conv.weight_orig.mul_(2)  # an optimizer step leaves the stale product behind
    x = torch.randn(2, 4, 8, 8)
    want = b.eval()(x)
    b.switch_to_deploy()
    assert rel(b(x), want) < 1e-5


def test_global_hooks_see_the_submodules():
    b = block(padding=1)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        b(torch.randn(2, 4, 8, 8))
    finally:
        handle.remove()
    assert seen.count("BatchNorm2d") == 3


def test_block_hooks_and_wrapping_relu_survive_fuse():
    net = nn.Sequential(block(padding=1), nn.ReLU()).eval()
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 4, 8, 8)
    want = net(x)
    fused = fuse(net)
    assert isinstance(fused[1], nn.ReLU)
    assert rel(fused(x), want) < 1e-6
    assert len(seen) == 2


@pytest.mark.parametrize(("k", "p"), [(3, 0), (5, 1), (5, 0)])
def test_small_padding(k, p):
    b = block(kernel=k, padding=p)
    x = torch.randn(2, 4, 9, 8)
    out = b(x)
    assert out.shape[2:] == (9 + 2 * p - k + 1, 8 + 2 * p - k + 1)
    b.eval()
    want = b(x)
    b.switch_to_deploy()
    assert rel(b(x), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "columns"), [(1, 1), (3, 3)])
def test_dilated_columns_of_padding_alone_do_not_crash(kernel, columns, dtype):
    """nn.Conv2d does, where its kernel has one column: ver's, here, and all of a 1×1 block's (torch 2.14)."""
    options = {"stride": (1, 2), "padding": (1, columns), "dilation": (1, 2)}
    x = torch.randn(2, 4, 7, 1).to(dtype).to(memory_format=torch.channels_last)
    for backend in planner.CHOICES:
        b = block(kernel=kernel, backend=backend, **options).to(dtype)
        for training in (True, False):
            grad = torch.randn_like(b.train(training)(x))
            eager = oracle.run(b, x, grad, lambda m, t: m._forward_modules(t))
            true = oracle.truth(b, x, grad)
            oracle.assert_as_good_as(oracle.run(b, x, grad), eager, true)
        b.switch_to_deploy()
        oracle.assert_as_good_as({"out": b(x)}, {"out": eager["out"]}, {"out": true["out"]})


def test_evaluate_train_evaluate_sees_new_weights():
    b = block(padding=1)
    x = torch.randn(2, 4, 8, 8)
    first = b.eval()(x).detach()
    optimizer = torch.optim.SGD(b.parameters(), 0.1)
    b.train()(x).square().sum().backward()
    optimizer.step()
    b.eval()
    assert rel(b(x), first) > 1e-3
    assert rel(b(x), b._forward_modules(x)) < 1e-6


def test_functional_call_and_double_backward():
    b = block(padding=1).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    b.eval()
    doubled = {name: 2 * p for name, p in b.named_parameters()}
    got = torch.func.functional_call(b, doubled, (x,))
    twin = copy.deepcopy(b)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert rel(got, twin(x)) < 1e-12
    small = ACBlock(1, 1, 3, padding=1, dtype=torch.float64, backend="eager")
    y = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: copy.deepcopy(small)(t), (y,))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_without_a_break(training, momentum):
    b = block(padding=1, momentum=momentum).train(training)
    twin = copy.deepcopy(b)
    compiled = torch.compile(b, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 8, 8)
    got, want = compiled(x), twin(x)
    assert rel(got, want) < 1e-6
    got.square().sum().backward()
    want.square().sum().backward()
    assert rel(b.square_conv.weight.grad, twin.square_conv.weight.grad) < 1e-5
    for got, want in zip(b.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_requested_backend_that_declines_gives_way():
    b = block(padding=1, backend="folded")
    plan = b.plan(torch.randn(2, 4, 8, 8))[1]
    assert plan.backend.NAME != "folded"
    assert plan.reason.startswith("folded was requested but declines: a batch norm normalises by the batch")
    b.backend = "eager"
    assert b.eval().plan(torch.randn(2, 4, 8, 8))[1] == planner.Choice(planner.BACKENDS["eager"], "requested")
