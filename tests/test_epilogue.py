"""act(Σ BN_b(W_b * x) + residual): every activation, residual, backend, dtype and layout against float64."""

import copy
import dataclasses
import io
import itertools
import pickle

import oracle
import pytest
import torch
from oracle import rel, scramble
from steps import saved_by
from torch import nn
from torch.nn import functional as F

from acnet_kernels import ACBlock, MobileOneBlock, RepVGGBlock, acblock, explain, fuse, lanes, reference
from acnet_kernels.backends import branches, node, planner, recompute
from acnet_kernels.ops import _extension, bn_sum, epilogue

ACTIVATIONS = (None, "relu", "relu6", "hardswish", "silu")
FOLLOWS = [(a, r) for a, r in itertools.product(ACTIVATIONS, (False, True)) if a or r]
BACKENDS = ("branches", "recompute", "moments", "eager")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Where the slope jumps; the gradient there is rounding's to decide.
KINKS = {None: (), "relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3), "silu": ()}


def away_from_kinks(z, activation):
    """1 where z is further from a kink than half precision moves it, else 0."""
    away = torch.ones_like(z)
    for kink in KINKS[activation]:
        away[(z - kink).abs() < 0.1] = 0
    return away


def run(block, x, residual, grad, forward):
    """oracle.run() with the residual and its gradient."""
    leaf = (
        None if residual is None else residual.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    )
    found = oracle.run(block, x, grad, lambda b, t: forward(b, t, leaf))
    return found if leaf is None else {**found, "residual": leaf.grad}


def block_of(b, x, residual):
    return b(x) if residual is None else b(x, residual=residual)


def modules_of(b, x, residual):
    """The block's modules one by one, and PyTorch's operators after them."""
    out = b._forward_modules(x)
    out = out if residual is None else out + residual
    return out if b.activation is None else getattr(F, b.activation)(out)


def judge(b, x, residual, *forwards):
    """Output and every gradient within the oracle's rule, by the block and by other ways to call it."""
    doubled = copy.deepcopy(b).double()
    wide = None if residual is None else residual.double()
    sum_alone = copy.deepcopy(doubled)
    sum_alone.activation = None
    z = oracle.reference_block(sum_alone, x.double(), wide).detach()
    grad = torch.randn(z.shape, device=z.device) * away_from_kinks(z, b.activation).float()
    eager = run(b, x, residual, grad, modules_of)
    true = run(doubled, x.double(), wide, grad.double(), oracle.reference_block)
    for forward in (block_of, *forwards):
        oracle.assert_as_good_as(run(b, x, residual, grad, forward), eager, true)


NODES = ("C++ node", "Python's node")


@pytest.fixture(params=NODES)
def either_node(request, monkeypatch):
    if request.param == "Python's node":
        monkeypatch.setattr(node, "NODE", None)
    elif node.NODE is None:
        pytest.skip(f"needs the C++ node: {_extension.WHY_NODE_MISSING}")


STEP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# Of backend, dtype and what follows every pair, by either node in turn.
@pytest.mark.parametrize(
    ("activation", "adds", "backend", "dtype", "either_node"),
    [
        (*follows, backend, STEP_DTYPES[(i + j + j // 3) % 3], NODES[(i + j) % 2])
        for (i, backend), (j, follows) in itertools.product(enumerate(BACKENDS), enumerate(FOLLOWS))
    ],
    ids=str,
    indirect=["either_node"],
)
def test_every_step(activation, adds, backend, dtype, either_node):
    for layout, frozen in ((LAYOUTS[0], False), (LAYOUTS[1], False), (LAYOUTS[1], True)):
        b = scramble(ACBlock(4, 6, 3, stride=1, padding=1, activation=activation, backend=backend)).to(dtype)
        x = torch.randn(3, 4, 9, 7).to(dtype).to(memory_format=layout)
        residual = torch.randn(3, 6, 9, 7).to(dtype) if adds else None  # in either layout, whatever x has
        if frozen:
            b.eval()
        judge(b, x, residual, lambda m, t, r: (block_of(m, t, r), block_of(m, t, r))[1])  # the second by a lane


@pytest.mark.parametrize(
    ("activation", "adds", "narrow", "either_node"),
    [
        (*follows, narrow, NODES[(i + j) % 2])
        for (i, narrow), (j, follows) in itertools.product(
            enumerate((torch.bfloat16, torch.float16)), enumerate(FOLLOWS)
        )
    ],
    ids=str,
    indirect=["either_node"],
)
def test_under_autocast(activation, adds, narrow, either_node):
    def cast(forward):
        def call(b, x, residual):
            with torch.autocast("cpu", narrow):
                return forward(b, x, residual)

        return call

    b = scramble(ACBlock(4, 6, 3, padding=1, activation=activation))
    x, residual = torch.randn(3, 4, 9, 7), torch.randn(3, 6, 9, 7).to(narrow) if adds else None
    grad = torch.randn(3, 6, 9, 7)
    z = oracle.reference_step(copy.deepcopy(b).double().step(), x.double(), residual.double() if adds else None)
    grad = grad * away_from_kinks(z.detach(), activation).float()
    got, eager = run(b, x, residual, grad, cast(block_of)), run(b, x, residual, grad, cast(modules_of))
    true = copy.deepcopy(b).double()
    want = run(true, x.double(), residual.double() if adds else None, grad.double(), oracle.reference_block)
    assert got["out"].dtype == narrow
    oracle.assert_as_good_as(got, eager, want)


OPTIONS = {
    "sum": {"norm": "sum"},
    "no affine": {"use_affine": False},
    "strided, grouped": {"stride": 2, "groups": 2},
    "circular": {"padding_mode": "circular"},
    "cumulative": {"momentum": None},
    "one branch": {"branches": ("square",)},
    "depthwise": {"groups": 4, "out_channels": 4},
}


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_of_every_kind(name, activation):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, **OPTIONS[name]}
    b = scramble(ACBlock(**arguments, activation=activation))
    x = torch.randn(3, 4, 9, 7)
    judge(b, x, torch.randn(b(x).shape))


@pytest.mark.parametrize("kind", [RepVGGBlock, MobileOneBlock])
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.Identity()], ids=str)
def test_the_module_of_other_blocks(kind, activation):
    name = "nonlinearity" if kind is RepVGGBlock else "activation"
    b = scramble(kind(6, 6, 3, padding=1))
    setattr(b, name, activation)
    hooked = copy.deepcopy(b)
    getattr(hooked, name).register_forward_hook(lambda m, i, o: None)  # it is called, then
    assert hooked.finishing() is None
    assert b.finishing() == {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: ""}[type(activation)]
    x, residual = torch.randn(3, 6, 8, 5), torch.randn(3, 6, 8, 5)
    for _ in range(2):
        torch.testing.assert_close(b(x), hooked(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b(x, residual=residual), activation(b._forward_modules(x) + residual))
    with pytest.raises(ValueError, match="does more after its sum"):
        hooked(x, residual=residual)
    with pytest.raises(ValueError, match="does more after its sum"):
        kind(16, 16, 3, padding=1, use_se=True)(torch.randn(2, 16, 4, 4), residual=torch.randn(2, 16, 4, 4))


# --- the operators ----------------------------------------------------------------------------------------

IMPLEMENTATIONS = {
    "operators": (epilogue.bn_sum_epilogue_forward, epilogue.bn_sum_epilogue_backward_),
    "pytorch": (epilogue._forward, epilogue._backward_),
}
# Odd sizes, less than a vector, several chunks and leftovers.
SHAPES = ((3, 17, 9, 5), (1, 1, 1, 5), (8, 33, 13, 13), (2, 600, 3, 3), (1, 5, 81, 91))
DTYPES = ((torch.float32, None), (torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("dtype", "narrow"), DTYPES, ids=str)
def test_the_operators(dtype, narrow, layout):
    for shape, (activation, adds) in itertools.product(SHAPES, FOLLOWS):
        number, outer = epilogue.ACTIVATIONS.index(activation or ""), narrow or dtype

        def like(t, dtype):
            return t.to(dtype).contiguous(memory_format=layout)

        parameter = torch.promote_types(dtype, torch.float32)
        ys = [like(torch.randn(shape) * 2 + 3, dtype) for _ in range(2)]
        gammas, betas = ([torch.rand(shape[1], dtype=parameter) + 0.5 for _ in ys] for _ in range(2))
        residual = like(torch.randn(shape), outer) if adds else None
        leaves = [t.double().requires_grad_() for t in (*ys, *gammas, *betas, *([residual] if adds else []))]
        z = sum(F.batch_norm(leaves[b], None, None, *leaves[b + 2 : b + 5 : 2], True, 0.0, 1e-4) for b in range(2))
        z = z + leaves[-1] if adds else z
        grad = like(torch.randn(shape) * away_from_kinks(z.detach(), activation).float(), outer)
        true_out = z if activation is None else reference.ACTIVATIONS[activation](z)
        true = torch.autograd.grad(true_out, leaves, grad.double())
        for implementation, (forward, backward_) in IMPLEMENTATIONS.items():
            out, means, _, rstds = forward(ys, gammas, betas, [1e-4] * 2, narrow, residual, number)
            assert out.dtype == outer
            assert rel(out, true_out) < TOLERANCES[outer], (implementation, shape, activation)
            if activation is None:
                continue
            kept = out if epilogue.is_clamp(activation) else residual
            for dresidual in (None, torch.full_like(grad, torch.nan)):
                targets = [ys[0].clone(memory_format=torch.preserve_format), torch.full_like(ys[1], torch.nan)]
                maps = [targets[0], ys[1]]  # one dy over its map, one apart
                dgammas, dbeta = backward_(
                    grad, maps, means, rstds, gammas, betas, [True] * 2, kept, number, targets, dresidual
                )
                found = [*targets, *dgammas, dbeta, dbeta, *([] if dresidual is None else [dresidual])]
                for a, e in zip(found, true, strict=dresidual is not None and adds):
                    error, allowed = (a.double() - e).norm(), TOLERANCES[outer] * max(e.norm(), 1)
                    assert error < allowed, (implementation, shape, activation)


@pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ kernels: {_extension.WHY_MISSING}")
def test_values_of_every_size():
    z = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -3.0, 3.0, 6.0, 1e30, -1e30])]).double()
    for dtype, activation in itertools.product((torch.float32, torch.float64), ACTIVATIONS[1:]):
        y = z.to(dtype).view(1, 1, 1, -1)
        numbers = [], [], [1e-5], None, y, epilogue.ACTIVATIONS.index(activation)
        out = epilogue.bn_sum_epilogue_forward([torch.zeros_like(y)], *numbers)[0]
        want = getattr(F, activation)(y)
        torch.testing.assert_close(out, want, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=1e-30)
        slope = torch.zeros_like(y)
        means = torch.zeros(1, 1, dtype=torch.float64)
        kept = out if epilogue.is_clamp(activation) else y
        epilogue.bn_sum_epilogue_backward_(
            torch.ones_like(y), [torch.zeros_like(y)], means, means, [], [], [False], kept, numbers[-1], [], slope
        )
        leaf = y.clone().requires_grad_()
        (want,) = torch.autograd.grad(getattr(F, activation)(leaf).sum(), leaf)
        smooth = away_from_kinks(y, activation) > 0
        torch.testing.assert_close(slope[smooth], want[smooth], rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_one():
    for activation in ACTIVATIONS[1:]:
        residual = torch.tensor([torch.nan, 1.0] * 20).view(1, 1, 1, -1)
        number = epilogue.ACTIVATIONS.index(activation)
        for forward, _ in IMPLEMENTATIONS.values():
            out = forward([torch.zeros_like(residual)], [], [], [1e-5], None, residual, number)[0]
            assert torch.equal(out.isnan(), residual.isnan())


@pytest.mark.parametrize(("activation", "adds"), [(None, True), ("relu6", False), ("silu", True)])
def test_opcheck(activation, adds):
    ys = [torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2)]
    gammas, betas = ([torch.randn(3, requires_grad=True) for _ in ys] for _ in range(2))
    residual = torch.randn(2, 3, 4, 5, requires_grad=True) if adds else None
    number = epilogue.ACTIVATIONS.index(activation or "")
    arguments = (ys, gammas, betas, [1e-5, 1e-4], None, residual, number)
    torch.library.opcheck(epilogue.bn_sum_epilogue_forward, arguments)
    if activation is None:
        return
    with torch.no_grad():
        out, means, _, rstds = epilogue.bn_sum_epilogue_forward(*arguments)
        kept = out if epilogue.is_clamp(activation) else residual
        given = ([t.detach() for t in tensors] for tensors in (ys, gammas, betas))
        ys, gammas, betas = given
        torch.library.opcheck(
            epilogue.bn_sum_epilogue_backward_,
            (
                *(torch.randn_like(out), ys, means, rstds, gammas, betas, [True, False]),
                *(None if kept is None else kept.detach(), number, [ys[0]], torch.empty_like(out)),
            ),
        )


def test_gradcheck():
    def forward(activation, *t):
        number = epilogue.ACTIVATIONS.index(activation)
        return epilogue.bn_sum_epilogue_forward(t[:2], t[2:4], t[4:6], [1e-3] * 2, None, t[6], number)[0]

    for activation in ("", "relu", "silu"):
        shapes = [(2, 3, 2, 3)] * 2 + [(3,)] * 4 + [(2, 3, 2, 3)]
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert torch.autograd.gradcheck(lambda *t, name=activation: forward(name, *t), tensors)


# --- autograd -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "backend", "either_node"),
    [
        (activation, backend, NODES[(i + j) % 2])
        for (i, activation), (j, backend) in itertools.product(enumerate(ACTIVATIONS), enumerate(BACKENDS[:3]))
    ],
    indirect=["either_node"],
)
def test_twice_differentiable_and_batched(backend, activation, either_node):
    b = scramble(ACBlock(4, 6, 3, padding=1, activation=activation, backend=backend)).double()
    x, residual = (torch.randn(2, c, 5, 6, dtype=torch.float64, requires_grad=True) for c in (4, 6))
    inputs = [x, residual, *b.parameters()]
    grad, found = torch.randn(2, 6, 5, 6, dtype=torch.float64), []
    for forward in (block_of, modules_of):
        first = torch.autograd.grad(forward(b, x, residual), inputs, grad.requires_grad_(), create_graph=True)
        of_grad = torch.autograd.grad(sum(t.square().sum() for t in first), [*inputs, grad], allow_unused=True)
        batched = torch.autograd.grad(
            forward(b, x, residual), inputs, torch.stack([grad.detach(), 2 * grad.detach()]), is_grads_batched=True
        )
        found.append([*first, *of_grad, *batched])
    for a, e in zip(*found, strict=True):
        if a is None or e is None:  # what nothing depends on is None to one, zeros to the other
            assert not any(t.any() for t in (a, e) if t is not None)
        else:
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_residual_used_twice(activation, either_node):
    b = scramble(ACBlock(6, 6, 3, padding=1, activation=activation, backend="branches"))
    x = torch.randn(2, 6, 7, 5, requires_grad=True)
    grads = []
    for forward in (block_of, modules_of):
        m = copy.deepcopy(b)
        y = x * 1.0
        (dx,) = torch.autograd.grad((forward(m, y, y) + 3 * y).square().sum(), x)
        grads.append(dx)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one(either_node):
    b = scramble(ACBlock(4, 6, 3, padding=1, activation="relu", backend="branches"))
    for needs in itertools.product((False, True), repeat=3):
        x, residual = (
            torch.randn(2, 4, 7, 5).requires_grad_(needs[0]),
            torch.randn(2, 6, 7, 5).requires_grad_(needs[1]),
        )
        b.requires_grad_(needs[2])
        out = b(x, residual=residual)
        assert out.requires_grad == any(needs)
        if any(needs):
            wanted = [t for t, need in zip((x, residual, b.hor_conv.weight), needs, strict=True) if need]
            got = torch.autograd.grad(out.square().sum(), wanted)
            want = torch.autograd.grad(modules_of(b, x, residual).square().sum(), wanted)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_without_an_activation_the_residuals_gradient_is_the_outputs(either_node):
    b = ACBlock(4, 6, 3, padding=1, backend="branches")
    residual, seen = torch.randn(2, 6, 7, 5, requires_grad=True), []
    residual.register_hook(lambda g: seen.append(g.data_ptr()))
    grad = torch.randn(2, 6, 7, 5)
    torch.autograd.grad(b(torch.randn(2, 4, 7, 5), residual=residual), residual, grad)
    assert seen == [grad.data_ptr()]


def test_changed_in_place_afterwards(either_node):
    for activation, allowed in ((None, True), ("relu", False), ("silu", True)):
        b = ACBlock(4, 6, 3, padding=1, activation=activation, backend="branches")
        x, residual = torch.randn(2, 4, 7, 5), torch.randn(2, 6, 7, 5)
        got = b(x, residual=residual)
        want = modules_of(b, x, residual)
        if not allowed:  # as of nn.ReLU's output
            got.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                got.sum().backward()
            continue
        parameters = list(b.parameters())
        got = torch.autograd.grad(F.relu(got, inplace=True).square().sum(), parameters)
        torch.testing.assert_close(
            got, torch.autograd.grad(F.relu(want).square().sum(), parameters), rtol=1e-3, atol=1e-3
        )


def test_a_retained_graph_and_hooks_on_what_is_saved(either_node):
    for activation in ("relu", "silu"):
        b = ACBlock(4, 6, 3, padding=1, activation=activation, backend="branches")
        x, residual = torch.randn(2, 4, 7, 5), torch.randn(2, 6, 7, 5, requires_grad=True)
        out, inputs = b(x, residual=residual), [residual, *b.parameters()]
        grad = torch.randn_like(out)
        first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), first, rtol=0, atol=0)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            out = b(x, residual=residual)
        torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), first, rtol=0, atol=0)


def test_a_chain_keeps_each_activation_once():
    """x, the maps that are kept, and one output a block: the next one's input."""
    blocks = [ACBlock(8, 8, 3, padding=1, activation="relu", backend="branches") for _ in range(3)]
    x = torch.randn(4, 8, 16, 16, requires_grad=True)

    def forward(x):
        for b in blocks:
            x = b(x, residual=x)
        return x

    out, kept = saved_by(forward, x)
    map_bytes = x.untyped_storage().nbytes()
    maps = 3 - branches.maps_again(blocks[0].plan(x)[0])
    assert sum(size == map_bytes for size in kept.values()) == len(blocks) * (maps + 1) + 1
    out.sum().backward()


def test_checkpointed():
    b = scramble(ACBlock(4, 4, 3, padding=1, activation="relu", backend="branches"))
    twin, x = copy.deepcopy(b), torch.randn(2, 4, 7, 5, requires_grad=True)
    got = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(lambda t: b(t, residual=t), x, use_reentrant=False).sum(), x
    )
    torch.testing.assert_close(got, torch.autograd.grad(twin(x, residual=x).sum(), x))


# --- refusals, and the module's life ------------------------------------------------------------------------


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.randn(2, 6, 7, 1), ValueError, r"have the output's shape, \(2, 6, 7, 5\), got \(2, 6, 7, 1\)"),
        (
            torch.randn(2, 6, 7, 5).double(),
            ValueError,
            r"have the output's dtype, torch.float32, got torch.float64",
        ),
        (torch.randn(2, 6, 7, 5, device="meta"), ValueError, r"have the output's device, cpu, got meta"),
        ("x", TypeError, r"be a tensor, got str"),
    ],
)
def test_residuals_that_are_no_map_like_the_output(residual, error, message, deploy):
    b = ACBlock(4, 6, 3, padding=1, activation="relu", deploy=deploy)
    state = {name: t.clone() for name, t in b.state_dict().items()}
    x = torch.randn(2, 4, 7, 5)
    for _ in range(2):
        with pytest.raises(error, match=f"residual must {message}"):
            b(x, residual=residual)
    assert all(torch.equal(t, state[name]) for name, t in b.state_dict().items())
    b(x)
    with pytest.raises(error):  # past the lane
        b(x, residual=residual)


def test_activations_that_are_none():
    with pytest.raises(ValueError, match=r"activation must be None or one of .*, got 'gelu'"):
        ACBlock(4, 6, 3, activation="gelu")
    with pytest.raises(ValueError, match="got ''"):
        ACBlock(4, 6, 3, activation="")
    with pytest.raises(TypeError, match="activation must be None or a name, got ReLU"):
        ACBlock(4, 6, 3, activation=nn.ReLU())
    b = ACBlock(4, 6, 3)
    step, x = b.step(), torch.randn(2, 4, 7, 5)
    with pytest.raises(ValueError, match="activation"):
        acblock(x, step.branches, step.geometry, activation="tanh")
    got = acblock(x, step.branches, step.geometry, activation="relu", residual=torch.ones(2, 6, 5, 3))
    torch.testing.assert_close(got, F.relu(b._forward_modules(x) + 1))


def test_what_is_done_to_a_block_keeps_its_activation():
    b = scramble(ACBlock(4, 6, 3, padding=1, activation="hardswish")).eval()
    x, residual = torch.randn(2, 4, 7, 5), torch.randn(2, 6, 7, 5)
    want = b(x, residual=residual)
    assert "activation='hardswish'" in repr(b)
    file = io.BytesIO()
    torch.save(b, file)
    file.seek(0)
    deployed = copy.deepcopy(b)
    deployed.switch_to_deploy()
    others = [
        copy.deepcopy(b),
        pickle.loads(pickle.dumps(b)),
        torch.load(file, weights_only=False),
        deployed,
        fuse(b),
    ]
    for other in (*others, fuse(nn.Sequential(b))[0]):
        assert other.activation == "hardswish"
        torch.testing.assert_close(other(x, residual=residual), want, rtol=1e-4, atol=1e-5)
    assert not deployed.is_a_convolution
    old = pickle.loads(pickle.dumps(b))
    del old.activation  # pickled before there were any
    assert old(x).min() < -0.5


def test_a_lane_takes_what_follows_as_it_is_now():
    if node.NODE is None:
        pytest.skip(f"needs the C++ node: {_extension.WHY_NODE_MISSING}")
    b = scramble(ACBlock(4, 6, 3, padding=1, backend="branches"))
    x, residual = torch.randn(2, 4, 7, 5), torch.randn(2, 6, 7, 5)
    b(x)
    taken = []
    for b.activation, r in itertools.product(ACTIVATIONS, (None, residual)):
        taken.append(b.activation)
        torch.testing.assert_close(block_of(b, x, r), modules_of(b, x, r), rtol=1e-4, atol=1e-5)
    assert len(taken) == 10
    assert lanes.take(b, x, b.backend) is not None


def test_modules_that_only_they_can_compute():
    b = scramble(ACBlock(4, 6, 3, padding=1, activation="relu"))
    b.hor_conv.register_forward_hook(lambda m, i, o: 2 * o)
    x, residual = torch.randn(2, 4, 7, 5), torch.randn(2, 6, 7, 5)
    torch.testing.assert_close(b(x, residual=residual), modules_of(b, x, residual))


def test_tracers_and_transforms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = scramble(ACBlock(4, 4, 3, padding=1, activation="silu"))

        def forward(self, x):
            return self.b(x, residual=x)

    net, x = Net().eval(), torch.randn(2, 4, 7, 5)
    want = net(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), want)
    torch.testing.assert_close(torch.jit.trace(net, x)(x), want)
    torch.testing.assert_close(torch.func.vmap(net)(x[None])[0], want)
    torch.testing.assert_close(torch.func.jvp(net, (x,), (torch.ones_like(x),))[0], want)
    assert str(explain(net, x))


def test_meta_tensors():
    b = ACBlock(4, 6, 3, padding=1, activation="relu", device="meta")
    assert b(torch.randn(2, 4, 7, 5, device="meta"), residual=torch.randn(2, 6, 7, 5, device="meta")).shape == (
        2,
        6,
        7,
        5,
    )


def test_explain_says_where_the_activation_is_computed():
    net = nn.Sequential(
        ACBlock(4, 4, 3, padding=1, activation="relu"),
        ACBlock(4, 4, 3, padding=1, activation="relu", backend="eager"),
    )
    first, second = explain(net, (2, 4, 8, 8)).blocks
    assert first.reason.endswith("; relu in the sum's own passes") == (first.backend == "branches")
    assert second.reason.endswith("; relu after it, by PyTorch")


@pytest.mark.skipif(not _extension.TRITON, reason="Triton is not installed")
def test_where_cuda_computes_it():
    problem = dataclasses.replace(ACBlock(4, 4, 3, padding=1).plan(torch.randn(2, 4, 8, 8))[0], device="cuda")

    def where(activation, backend=branches, **changes):
        own = dataclasses.replace(problem, channels_last=True, **changes) if backend is branches else problem
        return planner.where_finished(own, planner.Choice(backend, ""), activation)

    within, after = "in the sum's own passes", "after it, by PyTorch"
    assert [where("relu"), where("silu")] == [within] * 2
    many = {"batch_stats": (True,) * 4}
    assert [where("relu", **many), where("silu", **many)] == [within, after]
    assert where("relu", dtype=torch.float64) == where("relu", recompute) == after
    assert planner.where_finished(problem, planner.Choice(branches, ""), "relu") == after  # NCHW


@pytest.mark.skipif(not _extension.LOADED, reason=f"needs the C++ kernels: {_extension.WHY_MISSING}")
def test_the_sum_alone_is_the_same_bits():
    """An epilogue that does nothing changes no bit."""
    ys = [torch.randn(3, 17, 9, 5) for _ in range(3)]
    sum_alone = bn_sum.bn_sum_forward(ys, [], [], [1e-5] * 3, None)[0]
    assert torch.equal(epilogue.bn_sum_epilogue_forward(ys, [], [], [1e-5] * 3, None, None, 0)[0], sum_alone)


@pytest.mark.parametrize("backend", ["branches", "eager"])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_an_infinite_output_hands_its_gradient_on_as_eagers_does(activation, backend):
    """float16 overflows so, and what scales its gradients must hear of it."""
    block = ACBlock(4, 4, 3, padding=1, activation=activation, backend=backend)
    plain = ACBlock(4, 4, 3, padding=1, backend="eager")
    plain.load_state_dict(block.state_dict())
    x, residual = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    residual[0, 1, 2, 3] = float("inf")
    grads = []
    for step in (lambda r: block(x, residual=r), lambda r: getattr(F, activation)(plain(x) + r)):
        given = residual.clone().requires_grad_()
        grads += torch.autograd.grad(step(given).sum(), given)
    assert torch.equal(*grads)
    found = torch.zeros(2, 4, 5, 5) + float("inf")
    slope = 1.0 if activation == "relu" else 0.0
    steep = epilogue.where_steep(torch.ones_like(found), found, activation)
    assert torch.equal(steep, torch.full_like(found, slope))
