"""tune(): what it measures, what it leaves alone, and what is made of it."""

import copy

import pytest
import torch
from clocks import FakeClock
from torch import nn

import acnet_kernels as ak
from acnet_kernels import ACBlock
from acnet_kernels.backends import planner, timing_cache
from acnet_kernels.spec import problem_of

TIMES = {"eager": 3.0, "branches": 2.0, "moments": 1.0, "recompute": 4.0}


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    monkeypatch.setenv("ACNET_KERNELS_CACHE", str(tmp_path / "tuned"))
    monkeypatch.setattr(timing_cache, "_known", {})
    planner._decided.cache_clear()
    yield FakeClock(monkeypatch, TIMES)
    planner._decided.cache_clear()


class Counter(nn.Module):
    """A module whose forward draws random numbers and changes a buffer, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return x + torch.rand_like(x)


def network(**options):
    return nn.Sequential(
        ACBlock(3, 8, 3, padding=1, **options),
        nn.BatchNorm2d(8),
        Counter(),
        ACBlock(8, 8, 3, padding=1),
        nn.Dropout(),
        ACBlock(8, 8, 3, padding=1),
        ACBlock(8, 8, 3, stride=2, padding=1),
    )


def test_each_distinct_step_is_measured_once_and_the_fastest_chosen():
    net = network()
    report = ak.tune(net, (2, 3, 9, 8))
    assert [(layer.names, layer.chosen) for layer in report.layers] == [
        (("0",), "moments"),
        (("3", "5"), "moments"),
        (("6",), "branches"),  # moments declines its stride
    ]
    assert report.layers[2].milliseconds == {"eager": 3.0, "branches": 2.0, "recompute": 4.0}
    assert report.left == {}
    assert [row.backend for row in ak.explain(net, (2, 3, 9, 8)).blocks] == ["moments"] * 3 + ["branches"]
    assert ak.explain(net, (5, 3, 9, 8)).blocks[0].measured == {}  # another batch is another step
    text = str(report)
    assert "step float32 nchw 2x8x9x8->8 k3" in text
    assert str(report.path) in text


def test_near_equals_are_the_simpler_ones(clock):
    clock.milliseconds = {"eager": 1.02, "branches": 1.0, "moments": 0.995, "recompute": 2.0}
    assert [layer.chosen for layer in ak.tune(network(), (2, 3, 9, 8)).layers] == ["eager"] * 3


def test_the_model_is_left_bit_for_bit_as_it_was():
    net = network()
    net(torch.randn(2, 3, 9, 8)).sum().backward()
    net[1].eval()
    net[3].requires_grad_(False)
    net[5].ver_bn.eval()
    twin, torch_state = copy.deepcopy(net), torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    x = torch.randn(2, 3, 9, 8)
    kept, torch_state = x.clone(), torch.get_rng_state()
    report = ak.tune(net, x)
    assert report.layers
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(x, kept)
    assert [m.training for m in net.modules()] == [m.training for m in twin.modules()]
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in twin.parameters()]
    for got, want in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(got, want)
    for p, grad in zip(net.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert report.left == {
        "5": "eager alone can: branches is passed over: a batch norm normalises by running statistics"
    }
    assert report.layers[1].step.startswith(
        "forward"
    )  # the frozen block's, whose input was none of a training step


def test_times_outlive_the_process(clock, monkeypatch):
    net = network()
    ak.tune(net, (2, 3, 9, 8))
    monkeypatch.setattr(timing_cache, "_known", {})  # as a new process has it
    planner._decided.cache_clear()
    before = len(clock.calls)
    table = ak.explain(net, (2, 3, 9, 8))
    assert [row.backend for row in table.blocks] == ["moments"] * 3 + ["branches"]
    assert len(clock.calls) == before
    assert table.blocks[0].measured == TIMES


def test_explain_shows_measured_times():
    net = ACBlock(3, 8, 3, padding=1)
    before, _ = str(ak.explain(net, (2, 3, 9, 8))), ak.tune(net, (2, 3, 9, 8))
    after = str(ak.explain(net, (2, 3, 9, 8)))
    assert "measured 1 ms, eager 3, branches 2, recompute 4" in after
    assert "measured 1 ms" not in before
    for text in (before, after):
        header, _, row, *_ = text.splitlines()
        assert row[header.index("measured") :].split("  ")[0] == ("" if text is before else "1")


@pytest.mark.parametrize("channels_last", [False, True])
def test_steps_have_the_layers_own_dtype_and_layout(channels_last, monkeypatch):
    seen = []
    measure = ak.autotune.timer.measure

    def spy(problem, backends, autocast):
        scratch = ak.autotune.timer.Scratch(problem, autocast, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert problem_of(scratch.step, scratch.x) == problem
        seen.append((problem, autocast))
        return measure(problem, backends, autocast)

    monkeypatch.setattr(ak.autotune.timer, "measure", spy)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = nn.Sequential(ACBlock(3, 8, 3, padding=1), ACBlock(8, 8, 3, padding=1)).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        ak.tune(net, torch.randn(2, 3, 9, 8).to(memory_format=layout))
    (first, autocast), (second, _) = seen
    assert autocast
    assert (first.input_dtype, second.input_dtype) == (torch.float32, torch.bfloat16)
    assert first.dtype == second.dtype == torch.bfloat16
    assert first.channels_last == second.channels_last == channels_last


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "sum"},
        {"padding_mode": "reflect"},
        {"kernel_size": 5, "padding": 1, "dilation": 2},
        {"branches": ("square", "ver"), "shift": (0, 1)},
        {"use_affine": False},
    ],
)
def test_any_block_can_be_tuned(options, clock):
    block = ACBlock(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1, **options})
    (layer,) = ak.tune(block, (2, 4, 11, 10)).layers
    assert set(layer.milliseconds) == set(clock.calls)
    block(torch.randn(2, 4, 11, 10)).sum().backward()


def test_what_is_not_measured_is_named_with_the_reason():
    net = network()
    net[3].backend = "eager"
    net[5].square_conv.register_forward_hook(lambda *_: None)
    net.append(ACBlock(8, 8, 3, padding=1).eval())
    net.unused = nn.ModuleList([ACBlock(3, 3, 3)])
    net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
    net[6].become(*net[6].eval().get_equivalent_kernel_bias())
    report = ak.tune(net, (2, 3, 9, 8))
    assert [layer.names for layer in report.layers] == [("0",)]
    assert report.left == {
        "3": "its backend is 'eager'",
        "5": "it runs through its submodules: square_conv has hooks",
        "6": "it is deployed",
        "7": "folded alone can: " + planner.REASONS["folded"],
        "unused.0": "does not run on this example in eval mode",
    }
    assert "unused.0: does not run" in str(report)


def test_without_memory_nothing_is_known(clock):
    clock.milliseconds = {}
    report = ak.tune(ACBlock(3, 8, 3, padding=1), (2, 3, 9, 8))
    assert report.layers == []
    assert report.left == {"(model)": "the device has not the memory to time it"}
    assert report.path is None


def test_a_directory_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACNET_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    net = ACBlock(3, 8, 3, padding=1)
    with pytest.warns(UserWarning, match="cannot be kept: .*below"):
        report = ak.tune(net, (2, 3, 9, 8))
    assert report.path is None
    assert "kept in this process alone" in str(report)
    assert ak.explain(net, (2, 3, 9, 8)).blocks[0].backend == "moments"


def test_wrong_arguments():
    with pytest.raises(ValueError, match="model must have a block to tune, this Linear has none"):
        ak.tune(nn.Linear(2, 2), (2, 2))
    with pytest.raises(TypeError, match="example must be a tensor or its shape"):
        ak.tune(network(), "2,3,9,8")
