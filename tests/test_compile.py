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

every_training_backend = pytest.mark.parametrize("backend", TRAINING)
every_mode = pytest.mark.parametrize(("backend", "training"), MODES)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(net, x, forward=None):
    """Output and gradients of one step, and the state it leaves."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    net.zero_grad()
    out = net(x) if forward is None else forward(x)
    out.square().mean().backward()
    return {
        "out": out.detach(),
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


@pytest.mark.parametrize(("norm", "layout"), [("branch", torch.channels_last), ("sum", torch.contiguous_format)])
@every_mode
def test_full_graph_forward_and_backward(backend, training, norm, layout):
    net = scramble(Net(backend, norm=norm)).train(training).to(memory_format=layout)
    twin = through_modules(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same_step(net, twin, torch.randn(4, 4, 8, 8).to(memory_format=layout), compiled)


@pytest.mark.parametrize("options", [{"momentum": None, "use_affine": False}, {"padding_mode": "reflect"}])
@every_training_backend
def test_full_graph_with_options(backend, options):
    net = Net(backend, **options)
    twin = through_modules(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the cumulative average moves differently in every step
        assert_same_step(net, twin, torch.randn(4, 4, 8, 8), compiled)


@pytest.mark.parametrize(
    ("backend", "dtype"), [*((b, torch.bfloat16) for b in TRAINING), ("branches", torch.float16)]
)
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


@every_training_backend
def test_inference_then_training_then_evaluation(backend):
    net = Net(backend)
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


@every_training_backend
def test_compiled_autograd(backend):
    net = Net(backend)
    twin = through_modules(net)

    @torch.compile(backend="aot_eager")
    def train_step(x):
        net(x).square().mean().backward()

    x = torch.randn(4, 4, 8, 8)
    with torch._dynamo.config.patch(compiled_autograd=True):
        train_step(x)
    twin(x).square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


class Finished(torch.nn.Module):
    """Blocks with everything that may follow a sum: every activation, a residual with one and without."""

    def __init__(self, backend, most=5):
        super().__init__()
        follows = (("relu", True), (None, True), ("silu", True), ("relu6", False), ("hardswish", True))[:most]
        self.adds = [adds for _, adds in follows]
        self.blocks = torch.nn.ModuleList(
            ACBlock(4, 4, 3, padding=1, activation=activation, backend=backend) for activation, _ in follows
        )

    def forward(self, x):
        for block, adds in zip(self.blocks, self.adds, strict=True):
            x = block(x, residual=x) if adds else block(x)
        return x


@pytest.mark.parametrize("backend", ["branches", "moments", "recompute"])
def test_full_graph_with_what_follows_the_sum(backend):
    net = scramble(Finished(backend))
    twin = through_modules(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for n in (5, 7, 3):
        assert_same_step(net, twin, torch.randn(n, 4, 8, 9), compiled)
    assert counter.frame_count == 2  # the first size as it is, the second for every size


def test_compiled_autograd_with_what_follows_the_sum():
    net = scramble(Finished("branches", most=3))
    twin, x = through_modules(net), torch.randn(4, 4, 8, 8)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda t: net(t).square().mean().backward(), backend="aot_eager")(x)
    twin(x).square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_inductor_with_what_follows_the_sum():
    net = scramble(Finished("branches")).to(memory_format=torch.channels_last)
    twin = through_modules(net)
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        assert_same_step(net, twin, torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last), compiled)


def assert_one_graph(net, x):
    torch.compiler.reset()
    report = torch._dynamo.explain(net)(x)
    assert report.graph_break_count == 0, report.break_reasons
    assert report.graph_count == 1


@pytest.mark.slow
def test_no_graph_break_in_an_acnet_resnet():
    blocks = torchvision.models.resnet.BasicBlock
    net = convert(torchvision.models.ResNet(blocks, [1, 1, 1, 1], num_classes=5))
    x = torch.randn(2, 3, 32, 32)
    blocks = explain(net, x).blocks  # what explain() did to the network must not break the graph
    assert len(blocks) == 8
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


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "training"), [*((b, True) for b in TRAINING), ("auto", False)])
def test_inductor_keeps_channels_last(backend, training):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training).to(memory_format=torch.channels_last)
    twin = through_modules(b)
    compiled = torch.compile(b, fullgraph=True, dynamic=True)
    for n in (4, 3):
        x = torch.randn(n, 4, 8, 8).to(memory_format=torch.channels_last)
        got = assert_same_step(b, twin, x, compiled)
        assert got["out"].is_contiguous(memory_format=torch.channels_last)
        assert got["x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "backend"), [*(("reduce-overhead", b) for b in TRAINING), ("max-autotune", "auto")]
)
def test_inductor_modes(mode, backend):
    net = scramble(Net(backend))  # its second block, of stride 2, is one that moments declines
    twin = through_modules(net)
    compiled = torch.compile(net, mode=mode, fullgraph=True)
    for _ in range(3):
        assert_same_step(net, twin, torch.randn(4, 4, 8, 8), compiled)


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


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_aot_inductor(training, tmp_path):
    """Training steps of several backends in one network: a package takes longer to compile than all else here."""
    backends = ("branches", "memory_saver", "recompute") if training else ("auto", "auto")
    blocks = [ACBlock(4, 4, 3, padding=1, stride=1 + i % 2, backend=backend) for i, backend in enumerate(backends)]
    net = scramble(torch.nn.Sequential(*blocks)).train(training)
    twin = through_modules(net)
    x = torch.randn(4, 4, 16, 16)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for n in (4, 9):
            x = torch.randn(n, 4, 16, 16)
            assert rel(loaded(x), twin(x)) < 1e-5


class Autocast(torch.nn.Module):
    """Every block's output of one input under autocast."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x):
        with torch.autocast("cpu", torch.float16):
            return torch.cat([block(x) for block in self.blocks])


@pytest.mark.slow
def test_aot_inductor_under_autocast(tmp_path):
    backends = ["branches", "moments", "recompute"]
    if torch.__version__ < "2.12":  # its packages hand operators another dtype than the graph's
        backends.remove("moments")
    net = Autocast(*(scramble(ACBlock(4, 6, 3, padding=1, backend=backend)) for backend in backends))
    x = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(net, (x,)), package_path=str(tmp_path / "net.pt2")
        )
        got, want = torch._inductor.aoti_load_package(package)(x), through_modules(net)(x)
    assert got.dtype == want.dtype == torch.float16
    parts = len(backends)
    for mine, its in zip(got.chunk(parts), want.chunk(parts), strict=True):
        assert rel(mine, its) < 2e-3
