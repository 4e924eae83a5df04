"""explain(): which path runs for every block of a model and why, and what convert() did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .acceleration import HostBlock, left_alone
from .backends import branches, eager, folded, moments, node, phases, planner, recompute
from .conversion import RECORD, Block, Conversion, blocks_of
from .observing import as_input, in_modes, undisturbed
from .ops import _extension
from .spec import BRANCH
from .steps import assignment

HOST = "host"  # the backend of an accelerated block that must run its own library's forward
FOLDED_BY_HOST = "folded by its own library"


@dataclass(frozen=True)
class BlockReport:
    """One call of one block: its input and output shapes (None if not known), the path taken and why.

    `saved_bytes` counts the maps the path keeps for backward (0 where nothing needs a gradient), `transient_bytes`
    what a step holds at most besides, its output and gradients included (None where not known). `measured` is
    backend → milliseconds of a step, as far as known, where the planner chooses by time.
    """

    name: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    backend: str
    reason: str
    parameters: int
    saved_bytes: int | None
    transient_bytes: int | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftAlone:
    """A block of another library, by its class's name, that `accelerate` has not taken, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The blocks in the order they run, every convolution convert() looked at, and what is not accelerated.

    str() is a table. `failure` says what the model raised on the input ('' where it ran): the blocks after that
    have no shapes.
    """

    blocks: list[BlockReport]
    conversions: list[Conversion]
    failure: str = ""
    left: list[LeftAlone] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        if self.blocks:
            header = (
                "block",
                "input",
                "output",
                "backend",
                "parameters",
                "saved",
                "besides",
                "measured",
                "reason",
            )
            lines += table(header, [_cells(block) for block in self.blocks])
            saved = [b.saved_bytes for b in self.blocks if b.saved_bytes is not None]
            total = f", {_size(sum(saved))} saved for backward" if saved else ""
            parameters = sum({b.name: b.parameters for b in self.blocks}.values())
            lines += [f"{len({b.name for b in self.blocks})} blocks, {parameters:,} parameters{total}"]
            if any(b.measured for b in self.blocks):
                lines += ["times are milliseconds of a step"]
        else:
            lines += ["no block in this model"]
        if self.failure:
            lines += [f"the model did not run on this input: {self.failure}"]
        if self.conversions:
            rows = [(c.name, "converted" if c.converted else "left", c.note) for c in self.conversions]
            lines += ["", *table(("convolution", "convert()", "why"), rows)]
        if self.left:
            lines += ["", *table(("not accelerated", "class", "why"), [astuple(one) for one in self.left])]
        return "\n".join(lines)


def explain(model: nn.Module, inputs: Sequence[int] | Tensor | None = None) -> Explanation:
    """What runs for every block of model, and why.

    The planner is asked about each block in the mode (train, eval, frozen) it is in now. To learn the shapes,
    model is run once in eval mode without gradients; parameters, statistics and modes stay as they are.

    Args:
        model: any module with blocks.
        inputs: an input tensor, or its shape (zeros in the dtype and on the device of the first parameter);
            None to list the blocks without shapes.

    Raises:
        TypeError: inputs is neither.
    """
    conversions = list(getattr(model, RECORD, []))
    left = [LeftAlone(*row) for row in left_alone(model)]
    blocks = {block: name or "(model)" for name, block in blocks_of(model).items()}
    if inputs is None:
        return Explanation([_without_shape(name, block) for block, name in blocks.items()], conversions, left=left)
    x = as_input(model, inputs)
    reports: list[BlockReport] = []
    failure = ""
    try:
        visit(model, x, blocks, lambda block, t: reports.append(_report(blocks[block], block, t)))
    except Exception as error:  # the model's own: what ran before it is told, and what stopped it
        failure = _failure(error)
    called = {report.name for report in reports}
    reports += [_without_shape(name, block) for block, name in blocks.items() if name not in called]
    return Explanation(reports, conversions, failure, left)


def visit(model: nn.Module, x: Tensor, blocks: Iterable[Block], look: Callable[[Block, Tensor], None]) -> None:
    """Runs model on x in eval mode without gradients, and calls look(block, input) before each of its blocks runs.

    The input is what the block's branches get. look finds its block in the mode the block was in, with gradients
    enabled. Parameters, buffers, modes and torch's random state are left as they were.
    """
    with undisturbed(model, x.device) as modes, ExitStack() as stack:

        def watch(block: Block) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = block.adapter.prepare(module, args[0]) if isinstance(block, HostBlock) else args[0]
                with in_modes({inner: modes[inner] for inner in module.modules()}), torch.enable_grad():
                    look(block, x)

            return hook

        for block in blocks:
            stack.callback(_module(block).register_forward_pre_hook(watch(block)).remove)
        model(x)


def _module(block: Block) -> nn.Module:
    return block.module if isinstance(block, HostBlock) else block


def _parameters(block: Block) -> int:
    return sum(parameter.numel() for parameter in _module(block).parameters())


def _report(name: str, block: Block, x: Tensor) -> BlockReport:
    try:
        rows, columns = block.geometry.output_size(x.shape[2], x.shape[3])
        shape = (x.shape[0], block.out_channels, rows, columns)
        backend, reason, memory, times = _path(block, x)
    except Exception as error:  # a table of what is wrong must not be what goes wrong
        return BlockReport(name, tuple(x.shape), None, "?", _failure(error), _parameters(block), None)
    return BlockReport(name, tuple(x.shape), shape, backend, reason, _parameters(block), *memory, times)


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _path(block: Block, x: Tensor) -> tuple[str, str, tuple[int | None, int | None], Mapping[str, float]]:
    unknown: Mapping[str, float] = {}
    if block.deploy:
        if isinstance(block, HostBlock):
            return "deployed", FOLDED_BY_HOST, (None, None), unknown
        conv = block.fused
        needed = x.requires_grad or any(p.requires_grad for p in conv.parameters())
        saved = x.numel() * x.element_size() if needed else 0
        return "deployed", "folded for good: one convolution", (saved, None), unknown
    forced = own_forward_reason(block, x)
    if forced is not None:  # what the submodules keep is theirs to know
        return (*_through(block, forced), (None, None), unknown)
    problem, plan = block.plan(x)
    times = planner.measured(problem) if plan.backend.NAME in planner.candidates(problem) else unknown
    reason = plan.reason
    if plan.backend is branches and problem.device == assignment.DEVICE:
        reason += f"; {phases.chosen(problem.explicit())}"
    by_node = {"cpu": (branches, moments, recompute), assignment.DEVICE: (branches,)}.get(problem.device, ())
    if plan.backend in by_node and node.NODE is None:
        reason += f"; in Python's autograd node: {_extension.WHY_NODE_MISSING}"
    elif plan.backend in (branches, recompute) and problem.norm == BRANCH and problem.device == "cpu":
        step = block.step()
        inputs = branches.inputs_of(x, step)
        if node.takes(x, inputs) and node.computes_directly(
            x, inputs.weights[0], inputs.config(step.geometry, "cpu")
        ):
            reason += "; all branches' convolutions at once, by the package's own"
    if activation := block.finishing():
        reason += f"; {activation} {planner.where_finished(problem, plan, activation)}"
    memory = plan.backend.saved_bytes(problem), plan.backend.transient_bytes(problem)
    return plan.backend.NAME, reason, memory, times


def own_forward_reason(block: Block, x: Tensor) -> str | None:
    """Why a block runs through its modules on this input, or None."""
    return block.module_path_reason() or (block.declines(x) if isinstance(block, HostBlock) else None)


def _without_shape(name: str, block: Block) -> BlockReport:
    try:
        backend, reason = _path_without_shape(block)
    except Exception as error:  # as in _report
        backend, reason = "?", _failure(error)
    return BlockReport(name, None, None, backend, reason, _parameters(block), None)


def _path_without_shape(block: Block) -> tuple[str, str]:
    if block.deploy:
        return "deployed", FOLDED_BY_HOST if isinstance(block, HostBlock) else "folded for good: one convolution"
    forced = block.module_path_reason()
    if forced is not None:
        return _through(block, forced)
    if not any(norm.batch_stats for norm in block.step().norms):
        return folded.NAME, "running statistics normalise"
    return "?", "depends on the input: give explain() one, or its shape"


def _through(block: Block, reason: str) -> tuple[str, str]:
    if isinstance(block, HostBlock):
        return HOST, f"its library's own forward: {reason}"
    return eager.NAME, f"through the submodules: {reason}"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else "×".join(map(str, shape))


def _cells(block: BlockReport) -> tuple[str, ...]:
    memory = ("?" if count is None else _size(count) for count in (block.saved_bytes, block.transient_bytes))
    shapes = _shape(block.input_shape), _shape(block.output_shape)
    time = f"{block.measured[block.backend]:.3g}" if block.backend in block.measured else ""
    return block.name, *shapes, block.backend, f"{block.parameters:,}", *memory, time, block.reason


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table, columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
