"""Small problems are bound by launches: how many a step takes, all phases by Triton."""

import copy
import itertools

import pytest
import torch
import triton
from blocks import assign, block_of, on_device_path
from clocks import FakeClock
from problems import DEPTHWISE, PROBLEMS, SMALL, Problem, Tensors
from steps import as_eager
from torch import Tensor

from acnet_kernels import Geometry, explain, geometry, tune
from acnet_kernels.backends import phases, timer, timing_cache
from acnet_kernels.kernels import configs
from acnet_kernels.ops import autocorrelation, triton_autocorrelation, triton_bn_sum, triton_conv
from acnet_kernels.ops.triton_conv import INTERPRETED
from acnet_kernels.steps import assignment, batchnorm, depthwise, packed
from acnet_kernels.steps import moments_passes as passes
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, LIBRARY, TRITON, Phases


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on: by Triton's launch hook, or by the interpreter's executor."""
    names: list[str] = []
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def counted(self, *args, **kwargs):
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)
    else:
        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(hook := lambda metadata: names.append(metadata.get()["name"]))
        yield names
        hooks.remove(hook)
        return
    yield names


@pytest.mark.parametrize(
    ("problem", "convolutions"),
    [
        (PROBLEMS[0], ("conv_branches", "conv_dgrad", "conv_wgrad")),
        (DEPTHWISE[0], ("depthwise_branches", "depthwise_dgrad", "depthwise_wgrad")),
    ],
    ids=["grouped", "depthwise"],
)
@pytest.mark.parametrize("config", [SMALL, None], ids=["several_tiles", "table"])
def test_launches_of_a_step(
    launches: list[str], config, problem: Problem, convolutions: tuple[str, ...], device: torch.device
) -> None:
    t = Tensors(problem, torch.float32, device)
    forward, *backward = convolutions
    weights = t.weights
    _, ys, norms = triton_conv.block_forward(t.x, weights, t.gammas, t.betas, t.eps, t.window)
    assert launches == [forward, "merge_statistics", "apply"]
    launches.clear()
    triton_bn_sum.bn_sum_backward_(t.grad, ys, norms.means, norms.rstds, t.gammas, [True] * 3, ys)
    triton_conv.input_grad(ys, weights, t.window, t.x.shape[2:], config=config)
    triton_conv.weight_grads(t.x, ys, weights, t.window, config=config)
    assert launches[:5] == ["reduce_grad", "merge_grad", "apply_grad", *backward]
    assert len(launches) <= 6


@pytest.mark.parametrize(
    ("problem", "convolutions"),
    [
        (PROBLEMS[0], ("conv_branches", "conv_dgrad", "conv_wgrad")),
        (DEPTHWISE[0], ("depthwise_branches", "depthwise_dgrad", "depthwise_wgrad")),
    ],
    ids=["grouped", "depthwise"],
)
def test_launches_and_host_work_of_a_blocks_step(
    launches: list[str],
    problem: Problem,
    convolutions: tuple[str, ...],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 3 launches forward and 6 backward, running statistics and counters included.

    What depends on shapes alone is worked out once.
    """
    on_device_path(monkeypatch)
    monkeypatch.setattr(batchnorm, "update_running", lambda *_: pytest.fail("the kernels moved them"))
    assign(monkeypatch, ALL_TRITON)
    block, x = block_of(problem, device)
    x.requires_grad_()
    forward, *backward = convolutions
    for again in range(2):
        launches.clear()
        out = block(x)
        assert launches == [forward, "merge_statistics", "apply"]
        launches.clear()
        out.sum().backward()
        assert launches[:5] == ["reduce_grad", "merge_grad", "apply_grad", *backward]
        assert len(launches) <= 6
        if not again:
            for owner, name in ONCE:
                monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(f"{name} was worked out again"))
    with pytest.raises(pytest.fail.Exception, match="worked out again"):
        block(x[:1])  # another shape


@pytest.mark.parametrize("assigned", [ALL_LIBRARY, Phases(TRITON, LIBRARY, LIBRARY)], ids=phases.label)
def test_running_statistics_cost_no_launch(
    assigned: Phases, launches: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the library's convolutions, too; only a buffer that the kernels do not take is moved apart."""
    on_device_path(monkeypatch)
    assign(monkeypatch, assigned)
    block, x = block_of(PROBLEMS[0], device)
    first = "conv_branches" if assigned.forward == TRITON else "statistics"
    apart: list[int] = []
    update = batchnorm.update_running
    monkeypatch.setattr(batchnorm, "update_running", lambda *args: (apart.append(1), update(*args)))
    block(x)
    assert launches == [first, "merge_statistics", "apply"]
    assert not apart
    for change in ("strided", "shared", "missing"):
        other, eager = copy.deepcopy(block), as_eager(block)
        for b in (other, eager):
            if change == "strided":
                b.hor_bn.running_mean = torch.zeros(2 * len(b.hor_bn.running_mean), device=device)[::2]
            elif change == "shared":
                b.hor_bn = b.square_bn
            else:
                b.hor_bn.running_mean = b.hor_bn.running_var = b.hor_bn.num_batches_tracked = None
            b(x)
        assert apart.pop()
        for a, e in zip(other.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("assigned", [ALL_LIBRARY, ALL_TRITON], ids=phases.label)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_follows_the_sum_costs_no_launch(
    activation: str,
    assigned: Phases,
    launches: list[str],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_device_path(monkeypatch)
    assign(monkeypatch, assigned)
    block, x = block_of(PROBLEMS[0], device)
    block.activation, residual = activation, torch.ones_like(block(x), requires_grad=True)
    launches.clear()
    out = block(x, residual=residual)
    first = "conv_branches" if assigned.forward == TRITON else "statistics"
    assert launches == [first, "merge_statistics", "apply"]
    launches.clear()
    out.sum().backward()
    assert launches[:3] == ["reduce_grad", "merge_grad", "apply_grad"]
    assert len(launches) <= 6
    assert residual.grad is not None


# What a step works out from shapes alone.
ONCE = [
    (configs, "choose"),
    (configs, "depthwise"),
    (configs, "power_of_two"),
    (geometry, "_place"),
    (triton_conv.Window, "of"),
    (triton_conv.Window, "output_size"),
]


def test_the_fastest_assignment_measured_runs(
    launches: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tune() times a step under every assignment of the phases; the fastest is kept, and explain() says so."""
    if INTERPRETED:
        monkeypatch.setattr(assignment, "DEVICE", "cpu")
    on_device_path(monkeypatch)
    monkeypatch.setattr(timing_cache, "_known", {})
    phases._decided.cache_clear()
    monkeypatch.setattr(timer, "WARM_UP", 1)  # in which a step does run
    best = Phases(TRITON, LIBRARY, LIBRARY)
    clock = FakeClock(monkeypatch, {"eager": 3.0, **{phases.label(a): 2.0 for a in EVERY}, phases.label(best): 1.0})
    block, x = block_of(Problem("", (1, 3, 3, 4), 4, conv={"padding": 1}), device)
    block.backend = "auto"
    (layer,) = tune(block, x).layers
    assert {phases.label(a) for a in EVERY} < set(clock.calls)
    assert (layer.chosen, layer.milliseconds["branches"]) == ("branches", 1.0)
    launches.clear()
    block(x).sum().backward()
    assert launches == ["conv_branches", "merge_statistics", "apply", "reduce_grad", "merge_grad", "apply_grad"]
    assert "forward by triton, dgrad by library, wgrad by library (measured 1 ms a step" in str(explain(block, x))


EVERY = list(itertools.starmap(Phases, itertools.product((LIBRARY, TRITON), repeat=3)))


def test_launches_of_second_moments(
    launches: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plane is one call, the four edge strips of all groups are another; 3 launches each at most."""
    monkeypatch.setattr(autocorrelation, "cross_correlation", _by_triton)
    monkeypatch.setattr(passes, "FEW_PIXELS", 0)  # they would be summed in double, which has no kernel
    x = torch.randn(2, 8, 6, 5, device=device)
    passes.moments_of(x, torch.zeros(8, device=device), 3, 2)
    assert launches == ["cross_correlation", "centred_total"] * 2
    launches.clear()
    monkeypatch.setattr(triton_autocorrelation.configs, "pixel_split", lambda M, programs, block: (2, -(-M // 2)))
    passes.moments_of(x, torch.zeros(8, device=device), 3, 2)
    assert launches == ["cross_correlation", "sum_splits", "centred_total"] * 2


def test_launches_of_a_depthwise_step_by_moments(launches: list[str], device: torch.device) -> None:
    """Five each way, whatever the number of branches; without dx, three."""
    geometry = packed.pack(Geometry.make((1, 3), padding=(0, 1), groups=2))
    for branches in (1, 4):
        weights = [torch.randn(2, 1, 1, 3, device=device) for _ in range(branches)]
        x, vectors = torch.randn(2, 2, 2, 5, device=device), [torch.ones(2, device=device)] * branches
        numbers = [0, 0, 1, 3, 1, 1] * branches, geometry
        launches.clear()
        step = depthwise.on_cuda["depthwise_step"](x, weights, vectors, vectors, [1e-5] * branches, *numbers, False)
        assert launches == ["channel_pivots", "autocorrelate", "merge", "prepare", "convolve"]
        out, means, _, *kept = step
        for need_x in (True, False):
            launches.clear()
            needs = need_x, [True] * branches, True
            args = out, x, weights, vectors, [], means, *kept, None, *numbers, *needs
            depthwise.on_cuda["depthwise_step_backward"](*args)
            assert launches == ["correlate", "merge", "differentiate", *["correct", "input_gradient"] * need_x]


def _by_triton(x: Tensor, x_pivot: Tensor, y: Tensor, *rest) -> tuple[Tensor, Tensor]:
    last = x.contiguous(memory_format=torch.channels_last)
    return triton_autocorrelation.cross_correlation(last, x_pivot, last, *rest)
