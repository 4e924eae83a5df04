"""A block's step on the device under every assignment of its phases, by the rule of the CPU's tests."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import rel, run, scramble
from steps import check

from acnet_kernels import ACBlock, explain, tune
from acnet_kernels.backends import branches, phases, timing_cache
from acnet_kernels.steps.assignment import ALL_TRITON, LIBRARY, TRITON, Phases

EVERY = list(itertools.starmap(Phases, itertools.product((LIBRARY, TRITON), repeat=3)))
# Channels in and out, input size, options.
BLOCKS = {
    "wide": (64, 96, (28, 27), {}),
    "stride": (48, 64, (29, 31), {"stride": 2}),
    "odd": (19, 21, (14, 15), {"kernel_size": 5, "padding": 1}),
    "groups": (64, 128, (14, 14), {"groups": 4, "dilation": 2, "padding": 2}),
    "depthwise": (96, 96, (28, 27), {"groups": 96}),
    "no_ver": (32, 32, (14, 13), {"branches": ("square", "hor"), "shift": (1, 0)}),
}


def block_of(name: str) -> tuple[ACBlock, torch.Tensor]:
    C, K, size, options = BLOCKS[name]
    options = {"kernel_size": 3, "padding": 1, "backend": "branches", **options}
    block = scramble(ACBlock(C, K, **options)).to("cuda", memory_format=torch.channels_last)
    return block, torch.randn(4, C, *size, device="cuda").contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("assignment", EVERY, ids="-".join)
@pytest.mark.parametrize("name", BLOCKS)
def test_step(name: str, assignment: Phases, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "phases_of", lambda step, x: assignment)
    check(*block_of(name), dtype)


@pytest.mark.parametrize("name", ["stride", "depthwise"])
def test_compiled_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "phases_of", lambda step, x: ALL_TRITON)
    block, x = block_of(name)
    grad = torch.randn_like(block(x))
    torch.compiler.reset()
    compiled = torch.compile(lambda m, t: m(t), fullgraph=True)
    plain, traced = run(block, x, grad), run(block, x, grad, compiled)
    assert all(rel(traced[key], t) < 1e-5 for key, t in plain.items())


def test_the_rules_choice_runs_uncompiled_and_compiled() -> None:
    block, x = block_of("wide")
    with torch.autocast("cuda", torch.bfloat16):
        assert "Triton's phases await measurement" in explain(block, x).blocks[0].reason
        torch.compiler.reset()
        plain, traced = block(x), torch.compile(block, fullgraph=True)(x)
    assert rel(traced, plain) < 1e-2


def test_autotune_times_every_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cache, "_known", {})
    block, x = block_of("wide")
    block.backend = "auto"
    with torch.autocast("cuda", torch.bfloat16):
        (layer,) = tune(block, x).layers
        assert all(layer.milliseconds[phases.label(assignment)] > 0 for assignment in EVERY)
        assert phases.chosen(block.plan(x)[0]).why.startswith("measured")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["branches", "moments", "recompute"])
def test_a_device_that_is_not_the_current_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "phases_of", lambda step, x: ALL_TRITON)
    block, x = block_of("wide")
    block.backend = backend
    first = block(x)
    assert torch.equal(block.to("cuda:1")(x.to("cuda:1")).to("cuda:0"), first)
