"""Tracers see a block's submodules: torch.fx, whose networks are exact in both modes, and torch.jit."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from oracle import rel, scramble
from stacks import MODES, Net, assert_same_state, through_modules
from steps import GEOMETRIES, VARIANTS
from torch import fx, nn

from acnet_kernels import ACBlock, convert, fuse


def resnet():
    """torchvision's, of one residual block a stage: with a shortcut of its own in all but the first."""
    models = pytest.importorskip("torchvision.models", reason="its networks are traced: extra `test`")
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return scramble(convert(net, backend="eager"))


def step(net, x):
    """The output in train, after a backward and its step, and the output in eval after that."""
    net.train().zero_grad()
    out = net(x)
    out.square().mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.01 * p.grad
        return out, net.eval()(x)


def assert_trains_alike(traced, net, x):
    twin = through_modules(net)
    for got, want in zip(step(traced, x), step(twin, x), strict=True):
        assert rel(got, want) < 1e-5
    assert_same_state(traced, twin)


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(training):
    net = resnet().train(training)
    traced = fx.symbolic_trace(net)
    assert not any(isinstance(module, ACBlock) for module in traced.modules())
    assert_trains_alike(copy.deepcopy(traced), net, torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("options", [*GEOMETRIES, *VARIANTS], ids=str)
def test_symbolic_trace_of_every_kind_of_block(options):
    net = nn.Sequential(scramble(ACBlock(4, 6, **{"kernel_size": 3, **options})))
    assert_trains_alike(fx.symbolic_trace(copy.deepcopy(net)), net, torch.randn(3, 4, 9, 11))


def test_a_tracer_may_take_the_block_for_a_leaf():
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, ACBlock) or super().is_leaf_module(m, module_qualified_name)

    net = resnet()
    twin = copy.deepcopy(net)
    traced = fx.GraphModule(twin, Tracer().trace(twin))
    assert sum(isinstance(module, ACBlock) for module in traced.modules()) > 0
    assert_trains_alike(traced, net, torch.randn(4, 3, 32, 32))


def test_a_folded_network_is_traced_as_its_convolutions():
    net = resnet().eval()
    x = torch.randn(2, 3, 32, 32)
    assert rel(fx.symbolic_trace(fuse(net))(x), net(x)) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_feature_extractor(training):
    net = resnet().train(training)
    extraction = pytest.importorskip(
        "torchvision.models.feature_extraction", reason="torchvision is missing: extra `test`"
    )
    extractor = extraction.create_feature_extractor(copy.deepcopy(net), {"layer2": "middle", "avgpool": "end"})
    want, x = {}, torch.randn(2, 3, 32, 32)
    net.layer2.register_forward_hook(lambda m, args, out: want.update(middle=out))
    net.avgpool.register_forward_hook(lambda m, args, out: want.update(end=out))
    got = extractor(x)
    net(x)
    assert got.keys() == want.keys()
    for name, t in got.items():
        assert rel(t, want[name]) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantisation_aware_training_by_fx():
    quantization = pytest.importorskip("torch.ao.quantization", reason="this torch has no FX quantisation any more")
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="this torch has none any more")
    net, x = resnet(), torch.randn(4, 3, 32, 32)
    mapping = quantization.get_default_qat_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_qat_fx(net.train(), mapping, (x,))
    before = {name: p.detach().clone() for name, p in prepared.named_parameters()}
    step(prepared, x)
    for name, p in prepared.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name
    quantised = quantize_fx.convert_fx(prepared.eval())
    assert not {nn.Conv2d, nn.BatchNorm2d} & {type(module) for module in quantised.modules()}
    assert quantised(x).shape == (4, 10)


# --- torch.jit.trace --------------------------------------------------------------------------------------

LOADS_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["acnet_kernels"] = None  # importing it is an error
import torch
for name in sys.argv[1:]:
    x, want = torch.load(name + ".tensors")
    torch.testing.assert_close(torch.jit.load(name)(x), want, msg=name)
"""


def jit_trace(net, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out, and still in use
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # nn.BatchNorm2d reads the size in training
        return torch.jit.trace(net, x, **options)


@pytest.mark.parametrize(("backend", "training"), MODES)
def test_a_traced_block_is_pytorchs_operators(backend, training):
    net = scramble(Net(backend)).train(training)
    twin, x, other = through_modules(net), torch.randn(3, 4, 9, 7), torch.randn(5, 4, 8, 12)
    traced = jit_trace(net, x, check_trace=not training)
    assert {node.kind().partition("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    assert "prim::PythonOp" not in {node.kind() for node in traced.inlined_graph.nodes()}
    if training:  # tracing is a step
        twin(x)
    for t in (x, other):
        assert rel(traced(t), twin(t)) < 1e-5
    assert_same_state(net, twin)


def test_a_traced_file_needs_no_package(tmp_path):
    files = []
    for index, options in enumerate((*GEOMETRIES, *VARIANTS)):
        net = scramble(ACBlock(4, 6, **{"kernel_size": 3, **options})).eval().requires_grad_(False)
        x = torch.randn(3, 4, 9, 11)
        files.append(str(tmp_path / str(index)))
        jit_trace(net, torch.randn(2, 4, 8, 12)).save(files[-1])
        torch.save((x, net(x)), files[-1] + ".tensors")
    subprocess.run([sys.executable, "-c", LOADS_WITHOUT_THE_PACKAGE, *files], check=True, cwd=tmp_path)
