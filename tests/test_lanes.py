"""Lanes: a step taken again in one call is the step that the long way takes, and anything changed goes that way."""

import contextlib
import copy
import pickle

import pytest
import torch
from oracle import scramble
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import acnet_kernels
from acnet_kernels import ACBlock, MobileOneBlock, RepVGGBlock, lanes
from acnet_kernels.backends import node
from acnet_kernels.ops import _extension
from acnet_kernels.ops.fuse_blocks import Arguments

pytestmark = pytest.mark.skipif(node.NODE is None, reason=f"needs the C++ node: {_extension.WHY_NODE_MISSING}")

BLOCKS = {
    "acb": lambda: ACBlock(4, 6, 3, padding=1, backend="branches"),
    "5x5, border": lambda: ACBlock(4, 6, 5, padding=1, shift=1, backend="branches"),
    "grouped, strided": lambda: ACBlock(4, 8, 3, stride=2, padding=1, groups=2, backend="branches"),
    "no affine": lambda: ACBlock(4, 4, 3, padding=1, use_affine=False, backend="branches"),
    "recompute": lambda: ACBlock(4, 6, 3, padding=1, backend="recompute"),
    "repvgg": lambda: RepVGGBlock(4, 4, 3, padding=1, backend="branches"),
    "mobileone": lambda: MobileOneBlock(4, 4, 3, padding=1, num_conv_branches=3, backend="branches"),
    "moments": lambda: ACBlock(4, 6, 3, padding=1, backend="moments"),
    "moments, repvgg": lambda: RepVGGBlock(4, 4, 3, padding=1, groups=2, backend="moments"),
    "moments, depthwise": lambda: ACBlock(4, 4, 3, stride=2, padding=1, groups=4, backend="moments"),
}
NODES = ("acb", "moments", "moments, depthwise")  # one of each kind


def both(make, dtype=torch.float32, layout=torch.contiguous_format):
    """(a block that has a lane, its twin without one, an input)."""
    b = scramble(make()).to(dtype).to(memory_format=layout)
    x = torch.randn(3, 4, 7, 5, dtype=dtype).to(memory_format=layout).requires_grad_()
    b(x)
    assert lanes._KEPT in b.__dict__
    return b, copy.deepcopy(b), x


def step(b, x):
    """Everything that a training step gives and leaves behind."""
    out = b(x)
    inputs = [x, *b.parameters()]
    found = torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out, *found, *(t.clone() for t in b.buffers())]


def outcome(b, x):
    """What a step gives, or how it fails."""
    try:
        return step(b, x)
    except Exception as error:
        return type(error), str(error)


def assert_same(found, wanted):
    for a, e in zip(found, wanted, strict=True):
        assert a.dtype == e.dtype
        assert a.stride() == e.stride()
        assert torch.equal(a, e)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_lane_gives_the_same_bits(name, dtype, layout):
    b, twin, x = both(BLOCKS[name], dtype, layout)
    assert lanes._KEPT not in twin.__dict__
    wanted = step(twin, x)
    taken = copy.deepcopy(list(b.buffers()))
    assert lanes.take(b, x, b.backend) is not None
    for buffer, was in zip(b.buffers(), taken, strict=True):
        buffer.copy_(was)
    assert_same(step(b, x), wanted)


@pytest.mark.parametrize("block", NODES)
def test_under_autocast(block):
    b, twin, x = both(BLOCKS[block])
    with torch.autocast("cpu", torch.bfloat16):
        assert lanes.take(b, x, b.backend) is None  # learned without it
        wanted = step(twin, x)
        found = step(b, x)
        assert lanes.take(b, x, b.backend).dtype == torch.bfloat16
    assert_same(found, wanted)
    assert lanes.take(b, x, b.backend) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*BLOCKS, "depthwise"])
def test_eval(name, dtype, layout):
    make = BLOCKS.get(name, lambda: ACBlock(4, 4, 3, padding=1, groups=4, backend="branches"))
    b, twin, x = both(make, dtype, layout)
    b.eval(), twin.eval()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            wanted = twin(x)
            b(x)
            found = lanes.take(b, x, b.backend)
            assert found is not None
            assert_same([b.finish(found), b(x)], [wanted, wanted])
    assert lanes.take(b, x, b.backend) is None
    assert b(x).requires_grad
    with torch.no_grad():
        b.train(), twin.train()
        assert_same([b(x)], [twin(x)])
        b(x)
        b.eval(), twin.eval()
        b.hor_bn.running_var.fill_(-1) if isinstance(b, ACBlock) else None
        twin.hor_bn.running_var.fill_(-1) if isinstance(b, ACBlock) else None
        twin.load_state_dict(b.state_dict())
        assert torch.equal(b(x).isnan(), twin(x).isnan())
        b(x)
        assert torch.equal(b.finish(lanes.take(b, x, b.backend)).isnan(), twin(x).isnan())


def test_python_without_the_node_agrees(monkeypatch):
    for name, make in BLOCKS.items():
        b, twin, x = both(make)
        found = step(b, x)
        with monkeypatch.context() as patch:
            patch.setattr(node, "NODE", None)
            wanted = step(twin, x)
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, msg=name)


# --- what a lane must see -----------------------------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _swap(b):
    conv, bn = b.rbr_dense.conv, b.rbr_dense.bn
    del b.rbr_dense.conv, b.rbr_dense.bn
    b.rbr_dense.bn, b.rbr_dense.conv = bn, conv


CHANGES = {
    "hook": lambda b: b.hor_conv.register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook": lambda b: b.ver_bn.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "backward hook": lambda b: b.ver_bn.register_full_backward_hook(lambda m, i, o: None),
    "own forward": lambda b: setattr(b.square_conv, "forward", lambda x: torch.zeros(3, 6, 7, 5)),
    "parametrized": lambda b: parametrize.register_parametrization(b.square_conv, "weight", Twice()),
    "eps": lambda b: setattr(b.hor_bn, "eps", 0.5),
    "momentum": lambda b: setattr(b.hor_bn, "momentum", 0.5),
    "cumulative": lambda b: setattr(b.hor_bn, "momentum", None),
    "frozen norm": lambda b: b.hor_bn.eval(),
    "eval": lambda b: b.eval(),
    "untracked": lambda b: setattr(b.hor_bn, "track_running_stats", False),
    "no statistics": lambda b: (setattr(b.hor_bn, "running_mean", None), setattr(b.hor_bn, "running_var", None)),
    "padding": lambda b: setattr(b, "padding", 2),
    "one padding": lambda b: setattr(b.hor_conv, "padding", (1, 1)),
    "dilation": lambda b: setattr(b, "dilation", 2),
    "padding mode": lambda b: setattr(b, "padding_mode", "reflect"),
    "another conv": lambda b: setattr(b, "hor_conv", nn.Conv2d(4, 6, (1, 3), padding=(0, 1))),
    "another class": lambda b: setattr(b, "hor_bn", nn.InstanceNorm2d(6)),
    "no branch": lambda b: setattr(b, "hor_conv", None),
    "double": lambda b: b.double(),
    "weight's dtype": lambda b: setattr(b.hor_conv.weight, "data", b.hor_conv.weight.data.double()),
    "fewer channels": lambda b: setattr(b.hor_conv.weight, "data", b.hor_conv.weight.data[:, :2]),
    "backend": lambda b: setattr(b, "backend", "eager"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_in_the_block(name):
    """The lane does not fit, and the block does what its twin does that never had one."""
    b, twin, x = both(BLOCKS["acb"])
    torch.manual_seed(0)
    CHANGES[name](b)
    torch.manual_seed(0)
    CHANGES[name](twin)
    x = x.detach().double().requires_grad_() if name == "double" else x
    assert lanes.take(b, x, b.backend) is None
    found, wanted = outcome(b, x), outcome(twin, x)
    if isinstance(wanted, list):
        assert_same(found, wanted)
    else:
        assert found == wanted


def test_a_container_in_another_order():
    b, twin, x = both(BLOCKS["repvgg"])
    _swap(b), _swap(twin)
    assert lanes.take(b, x, b.backend) is None
    assert_same(step(b, x), step(twin, x))


INPUTS = {
    "shape": lambda x: torch.randn(3, 4, 5, 7, requires_grad=True),
    "batch": lambda x: torch.randn(2, 4, 7, 5, requires_grad=True),
    "dtype": lambda x: x.detach().double(),
    "layout": lambda x: x.detach().to(memory_format=torch.channels_last).requires_grad_(),
    "strides": lambda x: torch.randn(3, 4, 14, 5)[:, :, ::2].requires_grad_(),
    "no gradient": lambda x: x.detach(),
    "meta": lambda x: x.detach().to("meta"),
    "class": lambda x: x.detach().as_subclass(type("Own", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_changes_in_the_input(name):
    b, _, x = both(BLOCKS["acb"])
    assert lanes.take(b, INPUTS[name](x), b.backend) is None


@contextlib.contextmanager
def _global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Watch,
    "forward mode": torch.autograd.forward_ad.dual_level,
    "global hook": _global_hook,
    "threads": _threads,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_changes_around_it(name):
    b, _, x = both(BLOCKS["acb"])
    with SURROUNDINGS[name]():
        assert lanes.take(b, x, b.backend) is None
    assert lanes.take(b, x, b.backend) is not None


def test_torch_func_goes_the_long_way():
    b, twin, x = both(BLOCKS["acb"])
    b.requires_grad_(False), twin.requires_grad_(False)

    def loss(m):
        def run(x):
            state = {name: t.clone() for name, t in m.state_dict().items()}
            return torch.func.functional_call(m, state, (x,)).square().sum()

        return run

    assert torch.equal(torch.func.grad(loss(b))(x), torch.func.grad(loss(twin))(x))


def test_what_is_known_of_times_changes_and_so_may_the_choice(monkeypatch):
    b, _, x = both(lambda: ACBlock(4, 6, 3, padding=1, backend="branches"))
    with acnet_kernels.memory_saver():
        assert lanes.take(b, x, b.backend) is None
    assert lanes._KEPT not in b.__dict__


def test_so_many_shapes_are_kept_and_no_more():
    b = ACBlock(2, 2, 3, padding=1, backend="branches")
    for n in range(2, 2 * lanes.MOST):
        b(torch.randn(n, 2, 3, 3))
        assert 1 <= len(b.__dict__[lanes._KEPT][0]) <= lanes.MOST


def test_where_there_can_be_none_it_is_not_looked_for_again(monkeypatch):
    looked = []
    monkeypatch.setattr(lanes, "_lane", lambda *_: looked.append(1))
    b = ACBlock(2, 2, 3, padding=1, backend="branches")
    for _ in range(3):
        b(torch.randn(3, 2, 3, 3))
    assert len(looked) == 1
    with torch.no_grad():
        b(torch.randn(3, 2, 3, 3))
    assert len(looked) == 2


def test_copies_and_pickles_have_none():
    b, _, x = both(BLOCKS["acb"])
    folded(b)
    for twin in (copy.deepcopy(b), pickle.loads(pickle.dumps(b)), copy.copy(b)):
        assert lanes._KEPT not in twin.__dict__
        assert lanes._FOLDED not in twin.__dict__
        assert torch.equal(twin(x), b(x))


# --- a fold read again ----------------------------------------------------------------------------------------

# What a fold in eval does not depend on.
INDIFFERENT = {"momentum", "cumulative", "frozen norm", "eval", "untracked", "backend"}


def folded(b):
    """The fold, as often as it takes to be read by one call, or how it fails."""
    try:
        return [acnet_kernels.fold([b])[0] for _ in range(3)][-1]
    except Exception as error:
        return type(error), str(error)


def is_read_again(b):
    return lanes.append_fold(b, Arguments.empty())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_fold_read_again_gives_the_same_bits(name, dtype):
    b = scramble(BLOCKS[name]()).to(dtype)
    first = acnet_kernels.fold([b])[0]
    assert not is_read_again(b)  # most blocks are folded once
    assert_same(folded(b), first)
    assert is_read_again(b)
    assert_same(folded(b), b.get_equivalent_kernel_bias())
    for t in [*b.parameters(), *b.buffers()]:  # in place, and replaced
        t.data = t.data * 2 if t.is_floating_point() else t
    for module in b.modules():
        for parameter, value in list(module._parameters.items()):
            if value is not None:
                setattr(module, parameter, nn.Parameter(value.detach().clone()))
    assert is_read_again(b)
    first = copy.deepcopy(b).get_equivalent_kernel_bias()
    assert_same(folded(b), first)
    first = b.get_equivalent_kernel_bias()
    grads = [torch.autograd.grad(sum(t.sum() for t in fold), list(b.parameters())) for fold in (folded(b), first)]
    assert_same(*grads)


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_in_a_block_is_seen_by_its_fold(name):
    b, twin, _ = both(BLOCKS["acb"])
    folded(b)
    assert is_read_again(b)
    for each in (b, twin):
        torch.manual_seed(0)
        CHANGES[name](each)
    assert is_read_again(b) == (name in INDIFFERENT)
    found, wanted = folded(b), folded(twin)
    if isinstance(wanted[0], torch.Tensor):
        assert_same(found, wanted)
    else:
        assert found == wanted


def test_a_deployed_block_or_one_under_global_hooks_is_not_read_again():
    b, _, _ = both(BLOCKS["acb"])
    folded(b)
    with _global_hook():
        assert not is_read_again(b)
    assert is_read_again(b)
    b.eval().switch_to_deploy()
    assert not is_read_again(b)


@pytest.mark.parametrize("norm", ["branch", "sum"])
def test_what_no_fold_reads_again(norm):
    b = ACBlock(4, 6, 3, padding=1, norm=norm)
    if norm == "branch":
        b.hor_conv.bias = nn.Parameter(torch.ones(6))
    assert_same(folded(b), copy.deepcopy(b).get_equivalent_kernel_bias())
    assert not is_read_again(b)


def test_where_no_fold_can_be_read_again_it_is_not_looked_for(monkeypatch):
    b, looked = nn.SyncBatchNorm.convert_sync_batchnorm(ACBlock(4, 6, 3, padding=1)), []
    monkeypatch.setattr(lanes, "_read", lambda *_, **__: looked.append(True))
    folded(b)
    folded(b)
    assert len(looked) == 1


# --- the node in autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", NODES)
def test_no_gradient_of_what_needs_none(block):
    for kept in ("x", "hor_conv.weight", "square_bn.weight", "ver_bn.bias"):
        b, twin, x = both(BLOCKS[block])
        for m in (b, twin):
            for name, p in m.named_parameters():
                p.requires_grad_(name == kept)
        x = x.detach().requires_grad_(kept == "x")
        b(x)
        results = []
        for m in (b, twin):
            m(x).sum().backward()
            results.append([x.grad, *(p.grad for p in m.parameters())])
            x.grad = None
        for a, e in zip(*results, strict=True):
            assert (a is None) == (e is None)
            assert a is None or torch.equal(a, e)


@pytest.mark.parametrize("block", NODES)
def test_twice_differentiable_and_batched(block):
    b, _, x = both(BLOCKS[block], torch.float64)
    eager = copy.deepcopy(b)
    eager.backend = "eager"
    grad, again = torch.randn_like(b(x)), torch.randn_like(x)
    found = []
    for m in (b, eager):
        inputs = [x, *m.parameters()]
        (dx,) = torch.autograd.grad(m(x), x, grad, create_graph=True)
        second = torch.autograd.grad(dx, inputs, again, allow_unused=True)
        (batched,) = torch.autograd.grad(m(x), x, torch.stack([grad, 2 * grad]), is_grads_batched=True)
        found.append([dx, *second, batched])
    for a, e in zip(*found, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.allclose(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", NODES)
def test_a_retained_graph_keeps_its_maps_and_hooks_what_they_are_given(block):
    b, _, x = both(BLOCKS[block])
    out, inputs = b(x), [x, *b.parameters()]
    grad, kept = torch.randn_like(out), []
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    assert_same(torch.autograd.grad(out, inputs, grad), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, inputs, grad)

    def pack(t):
        kept.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = b(x)
    out.backward(grad)
    assert len(kept) >= 4
    assert all(torch.equal(t, was) for t, was in kept)


@pytest.mark.parametrize("block", NODES)
def test_a_weight_changed_before_backward_is_refused(block):
    b, _, x = both(BLOCKS[block])
    out = b(x)
    with torch.no_grad():
        b.square_conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("block", NODES)
def test_checkpointed_steps_move_the_statistics_as_eager_does(block):
    b, _, x = both(BLOCKS[block])
    eager = copy.deepcopy(b)
    eager.backend = "eager"
    for m in (b, eager):
        torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).sum().backward()
    for a, e in zip(b.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, e)
