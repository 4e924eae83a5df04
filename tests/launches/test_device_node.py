"""A step of `branches` by the C++ node is what Python's node does: launches, arguments, gradients and refusals.

Kernels do nothing here, so what they write is whatever memory held; the library's convolutions do compute.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from oracle import scramble
from recording import Driver, Launch, extent
from torch import Tensor, nn

from acnet_kernels import ACBlock, RepVGGBlock, lanes
from acnet_kernels.backends import branches, device_node, node
from acnet_kernels.backends.branches import MapsStep
from acnet_kernels.backends.triton_node import TritonStep
from acnet_kernels.ops import _extension, launch
from acnet_kernels.steps.assignment import ALL_LIBRARY, ALL_TRITON, LIBRARY, TRITON, Phases

pytestmark = pytest.mark.skipif(node.NODE is None, reason=f"needs the C++ node: {_extension.WHY_NODE_MISSING}")

LAST = torch.channels_last
POINTERS = 2**20  # from here on a number of 8 bytes is an address
BLOCKS = {
    "acb": lambda: ACBlock(4, 6, 3, padding=1, backend="branches"),
    "5x5, border": lambda: ACBlock(4, 6, 5, padding=1, shift=1, backend="branches"),
    "grouped, strided": lambda: ACBlock(4, 8, 3, stride=2, padding=1, groups=2, backend="branches"),
    "no affine": lambda: ACBlock(4, 6, 3, padding=1, use_affine=False, backend="branches"),
    "identity": lambda: RepVGGBlock(4, 4, 3, padding=1, backend="branches"),
}
BOTH = pytest.mark.parametrize("phases", [ALL_TRITON, ALL_LIBRARY], ids=lambda phases: phases.forward)


@pytest.fixture(autouse=True)
def _assigned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = request.node.callspec.params["phases"]
    monkeypatch.setattr(branches, "phases_of", lambda step, x: phases)


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Within it lanes go to Python's node."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(device_node.Launches, "forward", lambda *_: None)
            yield

    return context


class Step:
    """A block on an input, what follows it, and a gradient."""

    def __init__(self, block: nn.Module, residual: bool = False, activation: str | None = None) -> None:
        self.block = scramble(block).to(memory_format=LAST)
        self.block.activation = activation
        self.x = torch.randn(3, 4, 7, 5).contiguous(memory_format=LAST).requires_grad_()
        like = self.block(self.x).detach()
        self.residual = torch.randn_like(like).requires_grad_() if residual else None
        self.grad = torch.randn_like(like)
        inputs = list(self.leaves().values())
        torch.autograd.grad(self.forward(), inputs, self.grad)  # records

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "residual": self.residual, **dict(self.block.named_parameters())}
        return {name: t for name, t in named.items() if t is not None}

    def forward(self) -> Tensor:
        return self.block(self.x, residual=self.residual)

    def taken(self, driver: Driver, again: int = 1) -> Step.Taken:
        """So many backwards of one forward."""
        driver.take()
        out = self.forward()
        taken = Step.Taken(out.grad_fn)
        taken.launches.append(canonical(driver.take(), self.named(out)))
        wanted = {name: t for name, t in self.leaves().items() if t.requires_grad}
        for i in range(again):
            found = torch.autograd.grad(
                out, list(wanted.values()), self.grad, retain_graph=i + 1 < again, allow_unused=True
            )
            taken.grads.append(dict(zip(wanted, found, strict=True)))
            taken.launches.append(canonical(driver.take(), {**self.named(out), **launched(taken.grads[-1])}))
        return taken

    def named(self, out: Tensor) -> dict[str, Tensor]:
        return {**self.leaves(), **dict(self.block.named_buffers()), "grad": self.grad, "out": out}

    class Taken:
        """By which node, its launches a direction, and the gradients a backward."""

        def __init__(self, function: Any) -> None:
            self.node = function.name()
            self.launches: list[list[Any]] = []
            self.grads: list[dict[str, Tensor | None]] = []


def launched(grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that launches write: others, allocated later, may lie where scratch memory did."""
    by_triton = branches.phases_of(None, None) == ALL_TRITON and not torch.is_autocast_enabled("cpu")
    own = {name: t for name, t in grads.items() if by_triton or "bn." in name or name == "residual"}
    return {f"gradient of {name}": t for name, t in own.items() if t is not None}


def canonical(launches: Sequence[Launch], named: dict[str, Tensor]) -> list[Any]:
    """Launches with every address by the tensor it is in, or else by when it is first seen."""
    others: dict[int, int] = {}

    def told(value: int, size: int) -> Any:
        for name, t in named.items():
            start, length = extent(t)
            if size == 8 and start <= value < start + length:
                return name, value - start
        if size == 8 and value >= POINTERS:
            return "other", others.setdefault(value, len(others)), value % 16
        return value

    return [one._replace(arguments=tuple([told(*argument) for argument in one.arguments])) for one in launches]


def is_ours(taken: Step.Taken) -> bool:
    return "DeviceStep" in taken.node


def assert_alike(ours: Step.Taken, pythons: Step.Taken) -> None:
    assert is_ours(ours)
    assert not is_ours(pythons)
    assert ours.launches == pythons.launches
    assert all(direction and all(one.plain for one in direction) for direction in ours.launches)
    for own, theirs in zip(ours.grads, pythons.grads, strict=True):
        assert described(own) == described(theirs)


def described(grads: dict[str, Tensor | None]) -> dict[str, Any]:
    """What they are, and how far those of the γs, rows of one result, are from the first one's."""
    of_gammas = [t.data_ptr() for name, t in grads.items() if name.endswith("bn.weight") and t is not None]
    found = {name: None if t is None else (t.dtype, t.shape, t.stride()) for name, t in grads.items()}
    return {**found, "γ": [address - of_gammas[0] for address in of_gammas]}


def assert_same_convolutions(ours: Step.Taken, pythons: Step.Taken, whole: bool = True) -> None:
    """The gradients of convolutions are the library's to the bit: of maps as they are, where kernels write no dy.

    whole: dx has nothing but these in it; an identity's dy is memory that no kernel has written.
    """
    for own, theirs in zip(ours.grads, pythons.grads, strict=True):
        compared = [name for name in own if name.endswith("conv.weight")] + ["x"] * whole
        assert len(compared) >= 2
        assert all(own[name].any() for name in compared)
        assert all(torch.equal(own[name], theirs[name]) for name in compared)


@BOTH
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_a_step(phases: Phases, activation: str | None, residual: bool, driver: Driver, by_python: Any) -> None:
    step = Step(BLOCKS["acb"](), residual, activation)
    driver.use_stream(0x1234)
    with by_python():
        pythons = step.taken(driver)
    ours = step.taken(driver)
    assert_alike(ours, pythons)
    assert {one.stream for direction in ours.launches for one in direction} == {0x1234}
    told = str(ours.launches)
    for name in ("x", "grad", "hor_bn.running_var", "ver_bn.num_batches_tracked", "square_bn.weight", "out"):
        assert (f"('{name}'," in told) == (phases == ALL_TRITON or name != "x")
    assert ("('residual'," in told) == residual
    if residual and activation is None:
        assert torch.equal(ours.grads[0]["residual"], step.grad)
    if phases == ALL_TRITON:
        assert "('gradient of ver_conv.weight'," in told
    assert "('gradient of square_bn.weight'," in told


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("phases", [ALL_LIBRARY], ids=["library"])
def test_the_librarys_convolutions(phases: Phases, name: str, driver: Driver, by_python: Any) -> None:
    step = Step(BLOCKS[name]())
    with by_python():
        pythons = step.taken(driver)
    ours = step.taken(driver)
    assert_alike(ours, pythons)
    assert_same_convolutions(ours, pythons, whole=name != "identity")


@BOTH
def test_under_autocast(phases: Phases, driver: Driver, by_python: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        step = Step(BLOCKS["acb"]())
        with by_python():
            pythons = step.taken(driver)
        ours = step.taken(driver)
    assert_alike(ours, pythons)
    if phases == ALL_LIBRARY:
        assert_same_convolutions(ours, pythons)


@BOTH
@pytest.mark.parametrize(
    "frozen", [("x",), ("hor_conv",), ("_conv",), ("x", "square", "ver_bn"), ("square_bn.weight",)]
)
def test_no_gradient_of_what_needs_none(
    phases: Phases, frozen: tuple[str, ...], driver: Driver, by_python: Any
) -> None:
    step = Step(BLOCKS["acb"]())
    for name, t in step.leaves().items():
        t.requires_grad_(not any(part in name for part in frozen))
    found = []
    for context in (by_python, contextlib.nullcontext):
        with context():
            for _ in range(3):  # learns, records, and takes
                out = step.forward()
                driver.take()
                out.backward(step.grad)
            found.append((canonical(driver.take(), step.named(out)), [t.grad for t in step.leaves().values()]))
            assert ("DeviceStep" in out.grad_fn.name()) == (context is contextlib.nullcontext)
            for t in step.leaves().values():
                t.grad = None
    (python_launches, python_grads), (launches, grads) = found
    assert launches == python_launches
    assert [t is None for t in grads] == [t is None for t in python_grads]
    assert [t is None for t in grads] == [not t.requires_grad for t in step.leaves().values()]


@BOTH
def test_a_retained_graph_keeps_its_maps_and_hooks_what_they_are_given(
    phases: Phases, driver: Driver, by_python: Any
) -> None:
    step = Step(BLOCKS["acb"]())
    with by_python():
        step.taken(driver, again=2)  # records what does not overwrite
        pythons = step.taken(driver, again=2)
    ours = step.taken(driver, again=2)
    assert_alike(ours, pythons)
    kept, overwritten = (
        [set(one.arguments) for one in direction if one.name == "apply_grad"] for direction in ours.launches[1:]
    )
    assert len(kept[0]) > len(overwritten[0])
    out = step.forward()
    torch.autograd.grad(out, step.x, step.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, step.x, step.grad)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = step.forward()
    assert "DeviceStep" in out.grad_fn.name()
    driver.take()
    out.backward(step.grad)
    (apply,) = [one for one in driver.take() if one.name == "apply_grad"]
    maps = {t.data_ptr() for t in saved if t.shape == out.shape}
    pointers = [argument.value for argument in apply.arguments if argument.value in maps]
    assert len(maps) == len(pointers) == 3  # read, and not written


@BOTH
def test_what_is_not_recorded_is_pythons_to_record(
    phases: Phases, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, called = Step(BLOCKS["acb"]()), []
    of = TritonStep if phases == ALL_TRITON else MapsStep
    backward = of.backward
    monkeypatch.setattr(of, "backward", staticmethod(lambda *args: called.append(1) or backward(*args)))
    with torch.no_grad():  # at an address that 16 does not divide
        weight = torch.empty(step.block.ver_conv.weight.numel() + 1)[1:].view(6, 4, 3, 1).normal_()
    step.block.ver_bn.weight = nn.Parameter(torch.empty(7)[1:].normal_())
    step.block.ver_conv.weight = nn.Parameter(weight)
    nodes, counts = [], []
    for _ in range(3):
        out = step.forward()
        nodes.append("DeviceStep" in out.grad_fn.name())
        called.clear()
        out.backward(step.grad)
        counts.append(len(called))
    assert nodes == [False, True, True]
    assert counts[-1] == 0
    monkeypatch.setattr(launch, "_routines", {})  # as if none were
    out = step.forward()
    assert "DeviceStep" not in out.grad_fn.name()
    out = step.forward()
    assert "DeviceStep" in out.grad_fn.name()
    called.clear()
    out.backward(step.grad)
    assert called == [1]


@BOTH
def test_tritons_launcher_where_it_is_to_run(
    phases: Phases, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(BLOCKS["acb"]())
    out = step.forward()
    assert "DeviceStep" in out.grad_fn.name()
    monkeypatch.setattr(launch, "WHY_TRITONS", "a test says so")
    driver.take()
    out.backward(step.grad)
    assert "DeviceStep" not in step.forward().grad_fn.name()
    assert not any(one.plain for one in driver.take())


@pytest.mark.parametrize("phases", [Phases(TRITON, LIBRARY, LIBRARY)], ids=["mixed"])
def test_mixed_phases_are_pythons(phases: Phases, driver: Driver) -> None:
    step = Step(BLOCKS["acb"]())
    assert lanes.take(step.block, step.x, "branches").grad_fn.name() == "MapsStepBackward"


@BOTH
def test_twice_differentiable_and_batched(phases: Phases, driver: Driver) -> None:
    """The definition's: what forward left, which is nothing here, has no part in it."""
    step = Step(BLOCKS["acb"]())
    eager = copy.deepcopy(step.block)
    eager.backend = "eager"
    again, found = torch.randn_like(step.x), []
    for block in (step.block, eager):
        inputs = [step.x, *block.parameters()]
        out = block(step.x)
        assert ("DeviceStep" in out.grad_fn.name()) == (block is step.block)
        (dx,) = torch.autograd.grad(out, step.x, step.grad, create_graph=True)
        second = torch.autograd.grad(dx, inputs, again, allow_unused=True)
        batch = torch.stack([step.grad, 2 * step.grad])
        (batched,) = torch.autograd.grad(block(step.x), step.x, batch, is_grads_batched=True)
        found.append([dx, *second, batched])
    for own, theirs in zip(*found, strict=True):
        assert (own is None) == (theirs is None)
        assert own is None or torch.allclose(own, theirs, rtol=1e-4, atol=1e-4)


@BOTH
def test_a_weight_changed_before_backward_is_refused(phases: Phases, driver: Driver) -> None:
    step = Step(BLOCKS["acb"]())
    out = step.forward()
    assert "DeviceStep" in out.grad_fn.name()
    with torch.no_grad():
        step.block.square_conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(step.grad)


@BOTH
def test_a_checkpointed_step_moves_the_statistics_once_a_forward(phases: Phases, driver: Driver) -> None:
    step = Step(BLOCKS["acb"]())
    driver.take()
    torch.utils.checkpoint.checkpoint(step.block, step.x, use_reentrant=False).backward(step.grad)
    assert [one.name for one in driver.take()].count("merge_statistics") == 2


@BOTH
def test_no_operator_is_called_that_waits_or_copies(phases: Phases, driver: Driver) -> None:
    step = Step(BLOCKS["acb"]())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        taken = step.taken(driver)
    assert is_ours(taken)
    called = {
        event.name for event in seen.events() if event.name.startswith("aten::") and not within_another(event)
    }
    convolutions = {"aten::convolution", "aten::convolution_backward", "aten::add_"}
    assert called == {"aten::to", "aten::select"} | (convolutions if phases == ALL_LIBRARY else set())


def within_another(event: Any) -> bool:
    """Whether an operator calls this one."""
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or within_another(parent))
