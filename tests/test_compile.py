"""torch.compile, compiled autograd, torch.export and AOTInductor on blocks and on an ACNet ResNet."""

import copy

import oracle
import pytest
import torch
import torchvision
from oracle import rel, scramble
from stacks import MODES, TRAINING, Net, assert_same_state, through_modules
from torch._dynamo.testing import CompileCounterWithBackend

from acnet_kernels import ACBlock, convert, explain, fuse

NAMED = [name for name in TRAINING if name != "auto"]  # which chooses one of these, in Python that others trace too
every_named_backend = pytest.mark.parametrize("backend", NAMED)
every_mode = pytest.mark.parametrize(("backend", "training"), MODES)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(net, x, forward=None):
    """Output, or outputs, and gradients of one step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    net.zero_grad()
    out = net(x) if forward is None else forward(x)
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    sum(t.square().mean() for t in outs).backward()
    return {
        **{f"out {i}": t.detach() for i, t in enumerate(outs)},
        "x": x.grad,
        **{n: p.grad for n, p in net.named_parameters() if p.grad is not None},
    }


def assert_same_step(net, twin, x, forward):
    got, want = step(net, x, forward), step(twin, x)
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert_same_state(net, twin)
    return got


# --- graphs -----------------------------------------------------------------------------------------------


@every_mode
def test_full_graph_forward_and_backward(backend, training):
    net = scramble(Net(backend, second={"norm": "sum"})).train(training).to(memory_format=torch.channels_last)
    twin = through_modules(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same_step(net, twin, torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last), compiled)


@every_named_backend
def test_full_graph_with_options(backend):
    net = Net(backend, momentum=None, use_affine=False, second={"norm": "sum", "padding_mode": "reflect"})
    twin = through_modules(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the cumulative average moves differently in every step
        assert_same_step(net, twin, torch.randn(4, 4, 8, 8), compiled)


@pytest.mark.parametrize(("backend", "dtype"), [*((b, torch.bfloat16) for b in NAMED), ("branches", torch.float16)])
def test_full_graph_under_autocast(backend, dtype):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend))
    x, grad = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 8, 8)

    def cast(forward):
        def call(module, t):
            with torch.autocast("cpu", dtype):
                return forward(module, t)

        return call

    def compiled(module, t):
        return torch.compile(module, backend="aot_eager", fullgraph=True)(t)

    got = oracle.run(b, x, grad, cast(compiled))
    eager = oracle.run(b, x, grad, cast(lambda m, t: m._forward_modules(t)))
    assert got["out"].dtype == dtype
    oracle.assert_as_good_as(got, eager, oracle.truth(b, x, grad))


@pytest.mark.parametrize(("backend", "training"), [*MODES, ("memory_saver", True)])
def test_every_batch_size_runs_the_same_graph(backend, training):
    block = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training)
    twin = through_modules(block)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    compilations = []
    for n in (5, 7, 12, 3):
        x = torch.randn(n, 4, 8, 9)
        torch._dynamo.mark_dynamic(x, 0)  # an error, if anything makes the size a constant
        got, want = compiled(x), twin(x)
        got.square().mean().backward()
        assert rel(got, want) < 1e-5
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4


def test_sizes_become_dynamic_by_themselves():
    block = ACBlock(4, 6, 3, padding=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for n in (5, 7, 12, 3):
        compiled(torch.randn(n, 4, 8, 9)).sum().backward()
    assert counter.frame_count == 2  # the first size as it is, the second for every size


# A map of one channel is dense in both layouts. All backends ask for the layout in one place; moments takes groups
# in kernels of its own.
@pytest.mark.parametrize(
    ("backend", "channels", "groups"),
    [("branches", 6, 1), ("branches", 1, 1), ("recompute", 6, 1), ("moments", 1, 1), ("moments", 6, 6)],
)
def test_both_layouts_in_turn(backend, channels, groups):
    block = ACBlock(channels, 6, 3, padding=1, groups=groups, backend=backend)
    twin, compiled = through_modules(block), torch.compile(block, backend="aot_eager", fullgraph=True)
    for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, channels, 8, 9).to(memory_format=layout)
        got, want = compiled(x), twin(x)
        got.square().mean().backward()
        assert rel(got, want) < 1e-5
        assert got.stride() == want.stride()


# What could grow stale does so in evaluation, where all are alike.
@pytest.mark.parametrize("backend", ["branches", "moments"])
def test_inference_then_training_then_evaluation(backend):
    net = ACBlock(4, 6, 3, padding=1, backend=backend)
    twin = through_modules(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 4, 8, 8)
    seen = []
    for _ in range(2):
        for model in (net, twin):
            model.eval()
        with torch.inference_mode():
            seen.append(compiled(x).clone())
            assert rel(seen[-1], twin(x)) < 1e-5
        with torch.no_grad():
            assert rel(compiled(x), twin(x)) < 1e-5
        for model in (net, twin):
            model.train()
        optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (net, twin)]
        assert_same_step(net, twin, x, compiled)
        for optimizer in optimizers:
            optimizer.step()
    assert rel(seen[1], seen[0]) > 1e-3


# What may follow a sum, every activation and none, and whether a residual is added before it.
FOLLOWS = (("relu", True), (None, True), ("silu", True), ("relu6", False), ("hardswish", True))


class Finished(torch.nn.Module):
    """Chains of blocks beside each other, one by each backend, with what follows their sums."""

    def __init__(self, chains):
        super().__init__()
        self.adds = [[adds for _, adds in follows] for follows in chains.values()]
        self.chains = torch.nn.ModuleList(
            torch.nn.ModuleList(
                ACBlock(4, 4, 3, padding=1, activation=activation, backend=backend) for activation, _ in follows
            )
            for backend, follows in chains.items()
        )

    def forward(self, x):
        found = []
        for chain, adds in zip(self.chains, self.adds, strict=True):
            y = x
            for block, with_residual in zip(chain, adds, strict=True):
                y = block(y, residual=y) if with_residual else block(y)
            found.append(y)
        return torch.cat(found)


def test_full_graph_with_what_follows_the_sum():
    # Other backends than branches leave it to PyTorch, a clamp as any activation.
    net = scramble(Finished({"branches": FOLLOWS, "moments": FOLLOWS[2:3], "recompute": FOLLOWS[3:4]}))
    twin = through_modules(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)

    def of_any_batch_size(x):
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    for n in (5, 3):
        assert_same_step(net, twin, torch.randn(n, 4, 8, 9), of_any_batch_size)
    assert counter.frame_count == 1


def test_compiled_autograd():
    # An activation that keeps its output, none, and one that keeps the sum; the eager backend is PyTorch's alone.
    net = scramble(Finished({name: FOLLOWS[i : i + 1] for i, name in enumerate(n for n in NAMED if n != "eager")}))
    twin, x = through_modules(net), torch.randn(4, 4, 8, 8)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda t: net(t).square().mean().backward(), backend="aot_eager")(x)
    twin(x).square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def assert_one_graph(net, x):
    torch.compiler.reset()
    report = torch._dynamo.explain(net)(x)
    assert report.graph_break_count == 0, report.break_reasons
    assert report.graph_count == 1


@pytest.mark.slow
def test_no_graph_break_in_an_acnet_resnet():
    blocks = torchvision.models.resnet.BasicBlock
    net = torchvision.models.ResNet(blocks, [1, 1, 1, 1], num_classes=5)
    net.layer3 = net.layer4 = torch.nn.Identity()  # more of what layer2 is
    net.fc = torch.nn.Linear(128, 5)
    net, x = convert(net), torch.randn(2, 3, 32, 32)
    blocks = explain(net, x).blocks  # what explain() did to the network must not break the graph
    assert len(blocks) == 4
    assert_one_graph(net, x)
    assert_one_graph(net.eval(), x)
    assert_one_graph(fuse(net), x)


def test_explain_looks_through_a_compiled_network():
    net = Net()
    compiled = torch.compile(net, backend="aot_eager")
    compiled(torch.randn(4, 4, 8, 8))
    before = copy.deepcopy(net.state_dict())
    blocks = explain(compiled, (4, 4, 8, 8)).blocks
    assert [b.name for b in blocks] == ["_orig_mod.first", "_orig_mod.second"]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


# --- inductor ---------------------------------------------------------------------------------------------


class Beside(torch.nn.ModuleList):
    """Modules that take the same input."""

    def forward(self, x):
        return [module(x) for module in self]


# Inductor's C++ is most of this file's time: one of each thing that is ours. All of the eager backend is PyTorch's.
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_inductor_keeps_channels_last(training):
    named = [name for name in NAMED if name != "eager"] if training else ["auto"]
    net = Beside(ACBlock(4, 6, 3, padding=1, backend=b) for b in named)
    net = scramble(net).train(training).to(memory_format=torch.channels_last)
    twin = through_modules(net)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for n in (4, 3):
        x = torch.randn(n, 4, 8, 8).to(memory_format=torch.channels_last)
        got = assert_same_step(net, twin, x, compiled)
        maps = [got["x"], *(got[f"out {i}"] for i in range(len(net)))]
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in maps)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_inductor_modes(mode):
    # Its second block, of stride 2, is one that moments declines. What follows a sum is in the same pass as it.
    follows = [Finished({"branches": FOLLOWS[:1]})] if mode == "reduce-overhead" else []
    net = scramble(Beside([Net("auto"), *follows])).to(memory_format=torch.channels_last)
    twin = through_modules(net)
    compiled = torch.compile(net, mode=mode, fullgraph=True)
    for _ in range(2):
        assert_same_step(net, twin, torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last), compiled)


# --- export -----------------------------------------------------------------------------------------------


@every_mode
def test_export_of_train_and_eval_graphs(backend, training):
    net = scramble(Net(backend)).train(training)
    twin = through_modules(net)
    dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(net, (torch.randn(4, 4, 8, 8),), dynamic_shapes=dynamic)
    exported = program.module()
    for n in (4, 9):
        x = torch.randn(n, 4, 8, 8)
        assert rel(exported(x), twin(x)) < 1e-5
    assert_same_state(exported, twin)
    if not training:
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum("conv2d" in name for name in targets) == (2 if backend != "eager" else 6)


class Autocast(torch.nn.Module):
    """Every block's output of one input under autocast."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x):
        with torch.autocast("cpu", torch.float16):
            return torch.cat([block(x) for block in self.blocks])


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """Training, evaluation and autocast in one package: compiling one takes longer than all else here."""
    cast = ["branches", "moments", "recompute"]
    if torch.__version__ < "2.12":  # its packages hand operators another dtype than the graph's
        cast.remove("moments")

    def chain(*backends):
        blocks = (ACBlock(4, 4, 3, padding=1, stride=1 + i % 2, backend=b) for i, b in enumerate(backends))
        return torch.nn.Sequential(*blocks)

    trained, evaluated = chain("branches", "memory_saver", "recompute"), chain("auto", "auto").eval()
    net = scramble(Beside([trained, evaluated, Autocast(*(ACBlock(4, 6, 3, padding=1, backend=b) for b in cast))]))
    twin = through_modules(net)
    x = torch.randn(4, 4, 16, 16)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for n in (4, 9):
            x = torch.randn(n, 4, 16, 16)
            *got, got_cast = loaded(x)
            *want, want_cast = twin(x)
            assert all(rel(mine, its) < 1e-5 for mine, its in zip(got, want, strict=True))
            assert got_cast.dtype == want_cast.dtype == torch.float16
            for mine, its in zip(got_cast.chunk(len(cast)), want_cast.chunk(len(cast)), strict=True):
                assert rel(mine, its) < 2e-3
