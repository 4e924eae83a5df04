"""A whole training step of a block, each of its phases by Triton or by the library, against float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import assign, block_of, on_device_path
from oracle import rel, run
from problems import DEPTHWISE, PROBLEMS, Problem
from steps import as_eager, check
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from acnet_kernels.backends import branches
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, LIBRARY, TRITON, Phases

NAMED = {p.name: p for p in (*PROBLEMS, *DEPTHWISE)}
WHOLE = [
    "primes",
    "one_row",
    "stride",
    "dilation_stride",
    "crop",
    "groups",
    "no_row",
    "alone",
    "depthwise_stride",
    "depthwise_5",
    "depthwise_no_row",
]
STEP = Problem("step", (2, 4, 4, 5), 6, conv={"padding": 1})
SHIFTED = NAMED["depthwise_shift"]
EVERY = [Phases(f, d, w) for f in (LIBRARY, TRITON) for d in (LIBRARY, TRITON) for w in (LIBRARY, TRITON)]
MIXED = [a for a in EVERY if a not in (ALL_TRITON, ALL_LIBRARY)]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device_path(monkeypatch)


@pytest.mark.parametrize("problem", [NAMED[name] for name in WHOLE], ids=str)
def test_all_phases_by_triton(problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, ALL_TRITON)
    check(*block_of(problem, device))


@pytest.mark.parametrize(
    ("name", "dtype"), [("stride", torch.float16), ("depthwise_shift", torch.bfloat16)], ids=str
)
def test_autocast(name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, ALL_TRITON)
    check(*block_of(NAMED[name], device), dtype)


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [*((a, STEP) for a in (*MIXED, ALL_LIBRARY)), (MIXED[0], SHIFTED), (MIXED[-1], SHIFTED)],
    ids=str,
)
def test_mixed_phases(
    assignment: Phases, problem: Problem, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign(monkeypatch, assignment)
    check(*block_of(problem, device))


@pytest.mark.parametrize(
    "options", [{"use_affine": False, "momentum": None}, {"padding_mode": "reflect", "shift": (1, -1)}], ids=str
)
def test_other_blocks(options: dict, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, ALL_TRITON)
    check(*block_of(Problem("", (2, 3, 4, 5), 4, conv={"padding": 1, **options}), device))


def test_weights_of_several_formats_and_an_input_in_nchw(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is in channels_last, as nn.Conv2d's with one weight in it."""
    assign(monkeypatch, ALL_TRITON)
    block, x = block_of(STEP, device)
    block.hor_conv.to(memory_format=torch.contiguous_format)
    check(block, x.contiguous())


@pytest.mark.parametrize(
    ("kept", "assignment"),
    [
        *((kept, ALL_TRITON) for kept in ("", "x", "hor_conv.weight", "square_conv.weight", "ver_bn", "conv")),
        *((kept, Phases(TRITON, LIBRARY, TRITON)) for kept in ("hor_conv.weight", "conv")),
    ],
    ids=str,
)
def test_frozen_parts_get_no_gradient(
    kept: str, assignment: Phases, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign(monkeypatch, assignment)
    block, x = block_of(STEP, device)
    for name, p in block.named_parameters():
        p.requires_grad_(bool(kept) and kept in name)
    x.requires_grad_(kept == "x")
    out = block(x)
    assert out.requires_grad == bool(kept)
    if kept:
        grad, eager = torch.randn_like(out), as_eager(block)
        mine, theirs = ([t for t in (x, *b.parameters()) if t.requires_grad] for b in (block, eager))
        got, want = torch.autograd.grad(out, mine, grad), torch.autograd.grad(eager(x), theirs, grad)
        assert all(rel(a, e) < 1e-4 for a, e in zip(got, want, strict=True))


def test_retained_graph_gives_the_same_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, ALL_TRITON)
    block, x = block_of(STEP, device)
    out, inputs = block(x.requires_grad_()), [x, *block.parameters()]
    grad = torch.randn_like(out)
    runs = [torch.autograd.grad(out, inputs, grad, retain_graph=again < 2) for again in range(3)]
    for a, b, c in zip(*runs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_dy_is_written_over_the_maps_unless_a_hook_keeps_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign(monkeypatch, ALL_TRITON)
    block, x = block_of(STEP, device)
    for hooked in (False, True):
        kept: list[tuple[Tensor, Tensor]] = []

        def pack(t: Tensor, kept: list[tuple[Tensor, Tensor]] = kept) -> Tensor:
            kept.append((t, t.clone()))
            return t

        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = block(x)
        else:
            out = block(x)
            for t in out.grad_fn.saved_tensors:
                pack(t)
        maps = [(t, before) for t, before in kept if t.shape == out.shape]
        assert len(maps) == 3
        out.sum().backward()
        assert all(torch.equal(t, before) == hooked for t, before in maps)


def test_differentiable_twice(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, ALL_TRITON)
    block, x = block_of(STEP, device)
    x.requires_grad_()
    found = []
    for b in (block, as_eager(block)):
        (dx,) = torch.autograd.grad(b(x).square().sum(), x, create_graph=True)
        weights = [conv.weight for conv in b.convs().values()]
        found.append(torch.autograd.grad(dx.square().sum(), [x, *weights]))
    assert all(rel(got, want) < 1e-3 for got, want in zip(*found, strict=True))


def test_eval_launches_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "phases_of", lambda step, x: pytest.fail("a training step"))
    block, x = block_of(STEP, device)
    block.eval()
    assert block.plan(x)[1].backend.NAME == "folded"
    before = copy.deepcopy(block.state_dict())
    torch.testing.assert_close(block(x), as_eager(block)(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


def test_compiles_without_a_break(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator of the whole forward where all phases are Triton's, the library's convolutions otherwise."""
    monkeypatch.undo()  # Dynamo cannot trace what poisons memory
    block, x = block_of(STEP, device)
    grad = torch.randn(2, 6, 4, 5, device=device)
    for assignment in (ALL_TRITON, MIXED[0]):  # in one process: the first compilation imports for seconds
        assign(monkeypatch, assignment)
        torch.compiler.reset()
        ops: list[str] = []

        def looking(graph: torch.fx.GraphModule, inputs: list[Tensor], ops: list[str] = ops) -> Callable[..., Any]:
            ops.extend(str(node.target) for node in graph.graph.nodes)
            return aot_eager(graph, inputs)

        compiled = torch.compile(lambda m, t: m(t), fullgraph=True, backend=looking)
        plain, traced = run(block, x, grad), run(block, x, grad, compiled)
        assert any("triton_forward" in op for op in ops) == (assignment == ALL_TRITON)
        assert plain.keys() == traced.keys()
        assert all(rel(traced[name], t) < 1e-5 for name, t in plain.items())
    torch.compiler.reset()
