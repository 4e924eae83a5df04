"""The planner's rule: what is known about times decides, and eager where it does not."""

import copy
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from clocks import FakeClock
from steps import saved_by
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from acnet_kernels import ACBlock, MobileOneBlock
from acnet_kernels.backends import branches, device_info, planner, timer, timing_cache
from acnet_kernels.ops import _extension
from acnet_kernels.spec import problem_of


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No times of other tests, and the C++ extension as if built."""
    monkeypatch.setenv("ACNET_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(timing_cache, "_known", {})
    monkeypatch.setattr(planner._extension, "WHY_MISSING", "")
    planner._decided.cache_clear()
    yield
    planner._decided.cache_clear()


def problem(*shape, block=None, **changes):
    block = ACBlock(shape[1], 8, 3, padding=1) if block is None else block
    return replace(block.plan(torch.empty(shape, device="meta"))[0], device="cpu", **changes)


def tuned(problem, **times):
    """tune() has measured these."""
    timing_cache.remember(problem, device_info.this_machine("cpu"), times, timing_cache.TUNED)


# --- the rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ({"eager": 1.0, "branches": 0.96}, "branches"),
        ({"eager": 1.0, "branches": 0.98}, "eager"),
        ({"moments": 0.94, "branches": 0.95, "eager": 1.0}, "branches"),
        ({"moments": 0.9, "branches": 0.95, "eager": 1.0}, "moments"),
        ({"recompute": 1.0}, "recompute"),
    ],
)
def test_a_backend_must_beat_every_simpler_one_by_the_margin(times, name):
    assert planner.fastest(times) == name


def test_branches_is_taken_where_its_passes_are_fused_and_nothing_is_measured():
    p = problem(2, 4, 9, 9)
    assert planner.decide(p, {}) == ("branches", planner.REASONS["branches"])
    name, why = planner.decide(p, {"eager": 1.234, "branches": 1.21})
    assert (name, "measured 1.23 ms, branches 1.21" in why) == ("eager", True)
    name, why = planner.decide(replace(p, batch_stats=(True, False, True)), {})
    assert (name, "passed over: a batch norm normalises by running statistics" in why) == ("eager", True)


def test_on_cuda_fused_passes_are_taken_where_triton_has_them(monkeypatch):
    monkeypatch.setattr(planner._extension, "TRITON", True)
    p = replace(problem(64, 16, 56, 56), device="cuda", channels_last=True, dtype=torch.bfloat16)
    assert planner.decide(p, {})[0] == "branches"
    for other in ({"channels_last": False}, {"dtype": torch.float64}):
        name, why = planner.decide(replace(p, **other), {})
        assert (name, "Triton's passes take channels_last maps" in why) == ("eager", True)
    monkeypatch.setattr(planner._extension, "TRITON", False)
    name, why = planner.decide(p, {})
    assert (name, "is not installed" in why) == ("eager", True)


def test_only_what_can_compute_the_step_is_a_candidate():
    assert planner.candidates(problem(2, 4, 9, 9)) == ["eager", "branches", "moments", "recompute"]
    strided = problem(2, 4, 9, 9, block=ACBlock(4, 8, 3, stride=2, padding=1))
    assert planner.candidates(strided) == ["eager", "branches", "recompute"]
    frozen = ACBlock(4, 8, 3, padding=1)
    frozen.ver_bn.eval()
    assert planner.candidates(problem(2, 4, 9, 9, block=frozen)) == ["eager"]
    assert planner.choose(problem(2, 4, 9, 9, block=frozen)).reason.startswith(
        "branches is passed over: a batch norm"
    )


def test_choices_are_the_same_every_time(monkeypatch):
    p = problem(64, 16, 20, 20)
    first = planner.choose(p)
    planner._decided.cache_clear()
    assert planner.choose(p) == first == planner.choose(replace(p))


def test_what_is_learnt_later_counts():
    p = problem(2, 4, 9, 9)
    assert planner.choose(p).backend is branches
    tuned(p, eager=1.0, branches=2.0)
    assert planner.choose(p).backend.NAME == "eager"
    assert planner.choose(replace(p, channels_last=True)).backend is branches  # of that nothing is known
    assert planner.measured(p) == {"eager": 1.0, "branches": 2.0}


def test_a_missing_extension_is_said_once(monkeypatch):
    p = problem(64, 4, 64, 64)
    monkeypatch.setattr(planner._extension, "WHY_MISSING", "the C++ extension is not built, in this test")
    planner._warn_without_extension.cache_clear()
    with pytest.warns(UserWarning, match="eager backend, which is slower: the C\\+\\+ extension is not built"):
        plan = planner.choose(p)
    assert plan.backend.NAME == "eager"
    assert plan.reason.endswith("branches is passed over: the C++ extension is not built, in this test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planner.choose(replace(p, grad=False))
    planner._warn_without_extension.cache_clear()


# --- where memory is to be saved --------------------------------------------------------------------------


def held(call):
    """(the most bytes that call() held at once of what it allocated, those it holds on to, its result)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now, result


STEPS = [
    ((128, 16, 32, 32), {"out_channels": 16}, {}),
    ((16, 3, 64, 64), {"out_channels": 32}, {}),
    ((16, 64, 28, 28), {"out_channels": 64}, {}),
    ((8, 64, 28, 28), {"out_channels": 64}, {"dtype": torch.bfloat16}),
    ((32, 16, 32, 32), {"out_channels": 16}, {"dtype": torch.bfloat16}),
    ((32, 16, 32, 32), {"out_channels": 16}, {"layout": torch.contiguous_format}),
    ((8, 192, 14, 14), {"out_channels": 192}, {}),
    ((8, 32, 32, 32), {"out_channels": 32, "kernel_size": 5, "padding": 2, "groups": 4}, {}),
    ((16, 64, 28, 28), {"out_channels": 64, "stride": 2}, {}),
    ((16, 64, 28, 28), {"out_channels": 64, "norm": "sum"}, {}),
]


@pytest.mark.parametrize("backend", ["eager", "branches", "moments", "recompute"])
@pytest.mark.parametrize(("shape", "options", "how"), STEPS, ids=str)
def test_transient_bytes_are_about_what_a_step_holds_besides(backend, shape, options, how):
    layout = how.get("layout", torch.channels_last)
    block = ACBlock(shape[1], **{"kernel_size": 3, "padding": 1, "backend": backend, **options})
    block.to(memory_format=layout)
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    module = planner.BACKENDS[backend]

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled="dtype" in how):
            return block(x)

    with torch.autocast("cpu", torch.bfloat16, enabled="dtype" in how):
        problem, plan = block.plan(x)
    if plan.backend is not module:
        assert "stride (2, 2) is not (1, 1)" in plan.reason
        return
    out = forward()
    grad = torch.randn_like(out)
    out.backward(grad)  # what is computed once for all is there
    block.zero_grad()
    x.grad = out = None
    most, kept, out = held(forward)
    backward, _, _ = held(lambda: out.backward(grad))
    besides = max(most - kept + out.nbytes, backward)
    assert 0.6 < module.transient_bytes(problem) / besides < 1.6


@pytest.mark.parametrize(
    ("shape", "options", "name"),
    [
        (
            (128, 3, 32, 32),
            {"out_channels": 16},
            "moments",
        ),  # one small map is kept where a step has three large ones
        ((128, 16, 32, 32), {"out_channels": 16}, "recompute"),
        ((8, 1024, 28, 28), {"out_channels": 1024}, "recompute"),  # a Gram matrix of 9216² against maps of 24 MiB
        ((4, 32, 32, 32), {"out_channels": 32, "kernel_size": 31, "padding": 15, "groups": 32}, "recompute"),
        ((1, 64, 2, 2), {"out_channels": 64}, "eager"),  # the kernels are more than the maps, whoever computes
    ],
    ids=str,
)
def test_memory_is_saved_by_what_a_network_would_hold(shape, options, name):
    block = ACBlock(
        shape[1], **{"kernel_size": 3, "padding": 1, "backend": "memory_saver", **options}, device="meta"
    )
    p = problem(*shape, block=block, channels_last=True)
    plan = planner.choose(p, "memory_saver")
    assert plan.backend is planner.BACKENDS[name]
    if name != "eager":
        assert f"{plan.backend.transient_bytes(p):,} besides" in plan.reason
        least = min(planner.network_bytes(module, p) for module in planner.SAVERS)
        assert least >= 0.8 * planner.network_bytes(plan.backend, p)
    assert planner.choose(replace(p, grad=False), "memory_saver") == planner.choose(replace(p, grad=False))


@pytest.mark.skipif(not _extension.LOADED, reason=f"only the C++ kernels are as fast: {_extension.WHY_MISSING}")
def test_pointwise_blocks_of_many_branches_and_few_channels_go_by_moments():
    def chosen(channels, branches, kernel=1, side=32):
        block = MobileOneBlock(channels, 64, kernel, padding=kernel // 2, num_conv_branches=branches)
        return planner.decide(problem(4, channels, side, side, block=block), {})

    assert chosen(48, 4) == ("moments", planner.REASONS["pointwise"])
    others = (48, 3), (49, 4), (48, 4, 3), (48, 4, 1, 31)
    assert [chosen(*given)[0] for given in others] == ["branches"] * 4


@pytest.mark.parametrize("half", [False, True])
def test_the_kernels_that_autocast_casts_count_as_kept(half):
    block = ACBlock(16, 24, 3, padding=1, backend="eager")
    x, known = torch.randn(4, 16, 9, 9, requires_grad=True), {t.data_ptr() for t in block.state_dict().values()}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        p, (_, kept) = block.plan(x)[0], saved_by(block, x)
    statistics = 3 * 2 * 24 * 4  # mean and rstd of each batch norm
    found = sum(size for at, size in kept.items() if at not in known)
    assert p.cast_weight_bytes == (p.weights * 2 if half else 0)
    assert found == planner.BACKENDS["eager"].saved_bytes(p) + statistics
    # Maps of a few pixels: kernels are most of what is kept, and eager alone keeps casts.
    block = ACBlock(256, 256, 3, padding=1, device="meta")
    small = problem(16, 256, 4, 4, block=block, dtype=torch.bfloat16, input_dtype=torch.bfloat16)
    assert planner.choose(small, "memory_saver").backend is planner.BACKENDS["recompute"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [8, 64])
def test_a_network_of_blocks_holds_less(c, dtype):
    def most(backend):
        network = torch.nn.Sequential(*(ACBlock(c, c, 3, padding=1, backend=backend) for _ in range(8)))
        network.to(memory_format=torch.channels_last)
        x = torch.randn(8, c, 16, 16).to(memory_format=torch.channels_last)

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = network(x)
            out.sum().backward()

        step()
        return held(step)[0]

    assert most("memory_saver") < 0.8 * most("eager")


def test_overlapping_requests_of_threads_are_each_kept():
    first, second, off = planner.memory_saver(), planner.memory_saver(), planner.memory_saver(False)
    p = problem(128, 16, 32, 32)

    def saving():
        return planner.choose(p).reason.startswith("memory saver")

    def elsewhere(call):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    first.__enter__()
    elsewhere(second.__enter__)
    assert saving()
    first.__exit__(None, None, None)
    assert saving()  # the other thread's
    elsewhere(off.__enter__)
    assert not saving()  # the last one entered decides
    second.__exit__(None, None, None)
    assert not saving()
    off.__exit__(None, None, None)
    assert not saving()


def test_requests_of_many_threads_leave_nothing_behind():
    lost = []

    def work():
        for _ in range(500):
            with planner.memory_saver():
                lost.append(not planner._saving)
            with pytest.raises(ZeroDivisionError), planner.memory_saver():
                _ = 1 // 0

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(lost)
    assert not planner._saving
    assert not planner._requests


# --- under torch.compile ----------------------------------------------------------------------------------


def test_a_graph_for_every_batch_size_does_not_depend_on_the_choice_for_one():
    block = ACBlock(4, 6, 3, padding=1)
    tuned(problem(20, 4, 8, 9, block=block), eager=1.0, branches=2.0)
    few, many = (planner.choose(problem(n, 4, 8, 9, block=block)).backend.NAME for n in (20, 3000))
    assert few != many  # or nothing is shown
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(block, backend=graphs, fullgraph=True)
    for n in (20, 3000, 50):  # torch's own fake convolution splits the sizes at 16
        x = torch.randn(n, 4, 8, 9)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert graphs.frame_count == 1
    torch.compiler.reset()


def test_a_size_that_another_makes_static_compiles():
    # Sizes alike share a symbol: where the batch is as large as the weight's channels, it becomes a constant late.
    torch.compiler.reset()
    compiled = torch.compile(ACBlock(4, 6, 3, padding=1), backend="eager", fullgraph=True, dynamic=True)
    assert compiled(torch.randn(4, 4, 8, 8)).shape == (4, 6, 8, 8)
    torch.compiler.reset()


def test_a_graph_of_one_size_takes_that_sizes_choice(monkeypatch):
    block, ran = ACBlock(4, 6, 3, padding=1), []
    x = torch.randn(3, 4, 8, 9)
    timing_cache.remember(
        block.plan(x)[0], device_info.this_machine("cpu"), {"eager": 9.0, "branches": 1.0}, timing_cache.TUNED
    )
    forward = branches.forward
    monkeypatch.setattr(branches, "forward", lambda x, step: ran.append(1) or forward(x, step))
    monkeypatch.setattr(planner, "_times_at_first_sight", lambda problem: pytest.fail("timed while compiling"))
    torch.compiler.reset()
    torch.compile(block, backend="eager", fullgraph=True)(x)
    assert ran
    torch.compiler.reset()


# --- timing at first sight --------------------------------------------------------------------------------


def test_the_switch_is_cudnns_and_acts_on_cuda_alone(monkeypatch):
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    here = problem(2, 4, 9, 9)
    there = replace(here, device="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert not planner._times_at_first_sight(there)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert planner._times_at_first_sight(there)
    assert not planner._times_at_first_sight(here)
    assert not planner._times_at_first_sight(replace(there, batch_stats=(True, False, True)))  # eager's alone
    capturing = True
    assert not planner._times_at_first_sight(there)


def test_nothing_is_timed_inside_a_backward(monkeypatch):
    """On CUDA the timed step's backward would wait for the thread that runs the outer one: for ever."""
    there, seen = replace(problem(2, 4, 9, 9), device="cuda"), []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def layer(x):
        seen.append(planner._times_at_first_sight(there))
        return x * 2

    checkpoint(layer, torch.ones(3, requires_grad=True), use_reentrant=True).sum().backward()
    assert seen == [True, False]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(planner, "_times_at_first_sight", lambda problem: True)
    return FakeClock(monkeypatch, {"eager": 3.0, "branches": 1.0, "moments": 2.0, "recompute": 4.0})


def test_each_problem_is_timed_once_and_the_fastest_kept(clock):
    block, x = ACBlock(4, 8, 3, padding=1), torch.randn(2, 4, 9, 9)
    assert block.plan(x)[1].backend is branches
    timed = len(clock.calls)
    assert clock.calls[:8] == ["eager", "branches", "moments", "recompute"] * 2  # in turn
    assert "measured 1 ms, eager 3, moments 2, recompute 4" in block.plan(x)[1].reason
    assert len(clock.calls) == timed
    block.plan(torch.randn(3, 4, 9, 9))
    assert len(clock.calls) > timed


def test_a_backend_without_the_memory_is_left_out_and_not_asked_again(clock):
    clock.milliseconds = {"moments": 2.0}
    block, x = ACBlock(4, 8, 3, padding=1), torch.randn(2, 4, 9, 9)
    assert block.plan(x)[1].backend.NAME == "moments"
    assert clock.calls.count("branches") == 1
    clock.milliseconds = {}
    x = torch.randn(3, 4, 9, 9)
    backend = block.plan(x)[1].backend
    timed = len(clock.calls)
    assert block.plan(x)[1].backend is backend
    assert len(clock.calls) == timed


@pytest.mark.parametrize(
    "options", [{}, {"norm": "sum"}, {"padding_mode": "reflect"}, {"stride": 2, "use_affine": False}]
)
def test_the_step_that_is_timed_first_is_the_step_it_would_have_been(clock, options):
    block = ACBlock(4, 8, 3, padding=1, **options)
    twin = copy.deepcopy(block)
    twin.backend = "branches"
    x = torch.randn(3, 4, 9, 9)
    torch.manual_seed(7)
    after = torch.rand(1)
    torch.manual_seed(7)
    results = []
    for module in (block, twin):
        t = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(module, t, use_reentrant=False)  # whose hooks must not see the scratch tensors
        out.float().square().sum().backward()
        results.append([out, t.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert clock.calls
    assert torch.equal(torch.rand(1), after)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_without_gradients_the_forward_is_timed(clock):
    with torch.no_grad():
        assert ACBlock(4, 8, 3, padding=1).plan(torch.randn(2, 4, 9, 9))[1].backend is branches
    assert {key.split()[0] for known in timing_cache._known.values() for key in known if "2x4x9x9" in key} == {
        "forward"
    }


# --- the timer itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2, "kernel_size": 5, "padding": 1}, {"shift": (1, -1), "branches": ("square", "hor")}],
)
def test_scratch_tensors_make_the_same_problem(options, autocast):
    block = ACBlock(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, **options})
    x = torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        p = block.plan(x)[0]
        scratch = timer.Scratch(p, autocast, torch.device("cpu"))
        assert problem_of(scratch.step, scratch.x) == p
    for name in planner.candidates(p):
        scratch.run(planner.BACKENDS[name])
    assert all(t.grad is None for t in scratch.leaves)


def test_a_call_takes_some_time():
    assert timer.milliseconds(lambda: None, torch.device("cpu")) > 0
