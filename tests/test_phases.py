"""Which convolutions of a `branches` step Triton is given: the rule, without running any."""

from dataclasses import replace

import pytest
import torch

from acnet_kernels import ACBlock, explain
from acnet_kernels.backends import constants, device_info, phases, planner, timing_cache
from acnet_kernels.backends.phases import label
from acnet_kernels.steps import assignment
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, LIBRARY, TRITON, Phases

KIND = device_info.Machine("cuda", "some GPU")


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    """Of which nothing is measured, in a process that has Triton."""
    monkeypatch.setattr(timing_cache, "_known", {KIND: {}})
    monkeypatch.setattr(phases, "this_machine", lambda device: KIND)
    monkeypatch.setattr(planner, "this_machine", lambda device: KIND)
    monkeypatch.setattr(assignment, "INSTALLED", True)
    phases._decided.cache_clear()
    yield
    phases._decided.cache_clear()


def problem(n, c, size, *, filters=None, dtype=torch.bfloat16, **options):
    block = ACBlock(c, filters or c, 3, **{"padding": 1, **options})
    found = block.plan(torch.empty(n, c, size, size, device="meta"))[0]
    return replace(found, device="cuda", channels_last=True, dtype=dtype, input_dtype=dtype)


LARGE, MIDDLE, SMALL = problem(512, 512, 28), problem(256, 64, 56), problem(128, 16, 32)


def choice(p, measured=()):
    return phases.choose(p, dict(measured)).phases


# --- the rule -------------------------------------------------------------------------------------------


def test_nothing_is_tritons_before_it_is_measured():
    assert choice(SMALL) == ALL_LIBRARY
    why = phases.choose(SMALL, {}).why
    assert "Triton's phases await measurement" in why
    assert choice(SMALL, {label(ALL_TRITON): 1.0, label(ALL_LIBRARY): 2.0}) == ALL_TRITON


def test_without_gradients_the_forward_alone_is_chosen():
    p = replace(SMALL, grad=False)
    assert phases.assignments(p) == [ALL_LIBRARY, Phases(TRITON, LIBRARY, LIBRARY)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "cpu"}, "kernels are for cuda, not cpu"),
        ({"total": True, "normed": (False,) * 3}, "not every branch has a batch norm of its own alone"),
        ({"dtype": torch.float64}, "no kernels for torch.float64"),
        ({"channels_last": False}, "not channels_last"),
    ],
)
def test_what_triton_cannot_run_is_the_library(change, why):
    found = phases.choose(replace(SMALL, **change), {label(ALL_TRITON): 1.0})
    assert found.phases == ALL_LIBRARY
    assert why in found.why
    assert phases.assignments(replace(SMALL, **change)) == [ALL_LIBRARY]


def test_without_triton_all_is_the_library(monkeypatch):
    monkeypatch.setattr(assignment, "INSTALLED", False)
    assert phases.chosen(SMALL).phases == ALL_LIBRARY
    assert "not installed" in phases.chosen(SMALL).why


def test_every_geometry_is_covered():
    for options in (
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"shift": (1, -1)},
        {"groups": 4},
    ):
        assert phases.declines(problem(8, 16, 16, **options)) is None
    reflected = problem(8, 16, 16, padding_mode="reflect").explicit()
    assert (reflected.shape[2:], reflected.geometry.padding, reflected.output_size) == ((18, 18), (0, 0), (16, 16))


# --- measured times -------------------------------------------------------------------------------------


def test_measured_times_come_before_the_model():
    found = phases.assignments(LARGE)
    assert len(found) == 8
    assert found[0] == ALL_LIBRARY
    measured = {label(a): 2.0 for a in found} | {"eager": 0.1, "branches": 0.1}
    assert choice(LARGE, measured) == ALL_LIBRARY  # alike: the first
    best = Phases(LIBRARY, TRITON, TRITON)
    assert choice(LARGE, measured | {label(best): 1.0}) == best
    assert "measured 1 ms a step" in phases.choose(LARGE, measured | {label(best): 1.0}).why


def test_every_assignment_is_timed_and_the_fastest_counts_for_branches():
    best, timed = Phases(TRITON, LIBRARY, TRITON), []

    def watch(p, contenders, autocast):
        timed.extend(c.NAME for c in contenders)
        found = dict.fromkeys((c.NAME for c in contenders), 2.0)
        return found | {name: 1.0 for name in found if name == label(best)}

    found = planner.measure(MIDDLE, False, watch)
    assert timed == ["eager", *(label(a) for a in phases.assignments(MIDDLE)), "moments", "recompute"]
    assert found["branches"] == 1.0
    assert phases.chosen(MIDDLE).phases != best
    timing_cache.remember(MIDDLE, KIND, found, timing_cache.TUNED)
    assert phases.chosen(MIDDLE).phases == best
    assert planner.measured(MIDDLE) == dict.fromkeys(("eager", "moments", "recompute"), 2.0) | {"branches": 1.0}
    timed.clear()
    cpu = replace(MIDDLE, device="cpu")
    assert planner.measure(cpu, False, watch).keys() == {"eager", "branches", "moments", "recompute"}


# --- who asks -------------------------------------------------------------------------------------------


def test_explain_says_what_runs_and_why(monkeypatch):
    monkeypatch.setattr(assignment, "DEVICE", "cpu")
    block = ACBlock(8, 8, 3, padding=1, backend="branches").to(memory_format=torch.channels_last)
    reason = explain(block, (2, 8, 6, 6)).blocks[0].reason
    assert reason.startswith(
        "requested; forward by library, dgrad by library, wgrad by library (Triton's phases await"
    )
    block = ACBlock(8, 8, 3, padding=1, backend="branches", norm="sum").to(memory_format=torch.channels_last)
    reason = explain(block, (2, 8, 6, 6)).blocks[0].reason
    assert "forward by library" in reason
    assert "(no phase is Triton's: not every branch has a batch norm of its own alone" in reason


def test_a_step_on_the_cpu_asks_nothing(monkeypatch):
    monkeypatch.setattr(phases, "problem_of", lambda *_: pytest.fail("a step was described again"))
    ACBlock(4, 4, 3, padding=1, backend="branches")(torch.randn(2, 4, 5, 5)).sum().backward()


def test_a_problem_in_pieces_is_the_same_problem():
    for p in (SMALL, problem(8, 16, 16, stride=2, groups=4, shift=(1, -1)), replace(SMALL, grad=False)):
        assert constants.from_constants(*constants.as_constants(p)) == p
        assert constants.phases_of(*constants.as_constants(p)) == phases.chosen(p).phases
