"""explain(): which path runs for every block of a model and why, and what convert() did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .backends import branches, cost, eager, folded, phases, planner
from .backends.machine import this_machine
from .block import ACBlock
from .surgery import RECORD, Conversion, blocks_of


@dataclass(frozen=True)
class BlockReport:
    """One call of one block: its input and output shapes (None if not known), the path taken and why.

    `saved_bytes` counts the maps the path keeps for backward (0 where nothing needs a gradient), `transient_bytes`
    what a step holds at most besides, its output and gradients included (None where not known). `predicted` and
    `measured` are backend → milliseconds of a step, as far as known, where the planner chooses by time.
    """

    name: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    backend: str
    reason: str
    parameters: int
    saved_bytes: int | None
    transient_bytes: int | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """The blocks in the order they run, and every convolution convert() looked at. str() is a table.

    `origin` says where the constants of the predicted times come from.
    """

    blocks: list[BlockReport]
    conversions: list[Conversion]
    origin: str = ""

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
                "predicted",
                "measured",
                "reason",
            )
            lines += table(header, [_cells(block) for block in self.blocks])
            saved = [b.saved_bytes for b in self.blocks if b.saved_bytes is not None]
            total = f", {_size(sum(saved))} saved for backward" if saved else ""
            parameters = sum({b.name: b.parameters for b in self.blocks}.values())
            lines += [f"{len({b.name for b in self.blocks})} blocks, {parameters:,} parameters{total}"]
            if any(b.predicted for b in self.blocks):
                lines += [f"times are milliseconds of a step; predictions: {self.origin}"]
        else:
            lines += ["no ACBlock in this model"]
        if self.conversions:
            rows = [(c.name, "converted" if c.converted else "left", c.note) for c in self.conversions]
            lines += ["", *table(("convolution", "convert()", "why"), rows)]
        return "\n".join(lines)


def explain(model: nn.Module, inputs: Sequence[int] | Tensor | None = None) -> Explanation:
    """What runs for every ACBlock of model, and why.

    The planner is asked about each block in the mode (train, eval, frozen) it is in now. To learn the shapes,
    model is run once in eval mode without gradients; parameters, statistics and modes stay as they are.

    Args:
        model: any module with ACBlocks.
        inputs: an input tensor, or its shape (zeros in the dtype and on the device of the first parameter);
            None to list the blocks without shapes.

    Raises:
        TypeError: inputs is neither.
    """
    conversions = list(getattr(model, RECORD, []))
    blocks = {block: name or "(model)" for name, block in blocks_of(model).items()}
    if inputs is None:
        return Explanation([_without_shape(name, block) for block, name in blocks.items()], conversions)
    x = as_input(model, inputs)
    reports: list[BlockReport] = []
    visit(model, x, lambda block, t: reports.append(_report(blocks[block], block, t)))
    called = {report.name for report in reports}
    reports += [_without_shape(name, block) for block, name in blocks.items() if name not in called]
    prices = cost.prices().get(this_machine(x.device.type).kind)
    return Explanation(reports, conversions, prices.origin if prices else "")


def visit(model: nn.Module, x: Tensor, look: Callable[[ACBlock, Tensor], None]) -> None:
    """Runs model on x in eval mode without gradients, and calls look(block, input) before each block runs.

    look finds its block in the mode the block was in, with gradients enabled. Parameters, buffers, modes and
    torch's random state are left as they were.
    """
    modes = {module: module.training for module in model.modules()}
    autocast = torch.is_autocast_enabled(x.device.type)
    before = {name: t.clone() for name, t in model.named_buffers()}

    def hook(block: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(block, ACBlock)
        with _modes({module: modes[module] for module in block.modules()}), torch.enable_grad():
            look(block, args[0])

    handles = [block.register_forward_pre_hook(hook) for block in blocks_of(model).values()]
    try:
        with (
            _modes(dict.fromkeys(modes, False)),
            torch.no_grad(),
            torch.random.fork_rng([x.device] if x.device.type == "cuda" else []),
            torch.autocast(x.device.type, enabled=autocast),
            torch.compiler.set_stance("force_eager"),  # a compiled model's graph has no blocks to look at
        ):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, t in model.named_buffers():
                if name in before and not torch.equal(t, before[name]):
                    t.copy_(before[name])


@contextmanager
def _modes(wanted: dict[nn.Module, bool]) -> Iterator[None]:
    before = {module: module.training for module in wanted}
    try:
        for module, mode in wanted.items():
            module.training = mode
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def as_input(model: nn.Module, inputs: Sequence[int] | Tensor) -> Tensor:
    """inputs, or zeros of that shape in dtype and on device of model's first parameter; TypeError if neither."""
    if isinstance(inputs, Tensor):
        return inputs
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not all(isinstance(n, int) for n in inputs):
        raise TypeError(f"inputs must be a tensor or its shape, got {inputs!r}")
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros(tuple(inputs), dtype=like.dtype, device=like.device)


def _parameters(block: ACBlock) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def _report(name: str, block: ACBlock, x: Tensor) -> BlockReport:
    rows, columns = block.geometry.output_size(x.shape[2], x.shape[3])
    backend, reason, memory, times = _path(block, x)
    shape = (x.shape[0], block.out_channels, rows, columns)
    return BlockReport(name, tuple(x.shape), shape, backend, reason, _parameters(block), *memory, *times)


def _path(block: ACBlock, x: Tensor) -> tuple[str, str, tuple[int, int | None], planner.Times]:
    unknown = planner.Times({}, {})
    if block.deploy:
        conv = block.fused_conv
        needed = x.requires_grad or any(p.requires_grad for p in conv.parameters())
        saved = x.numel() * x.element_size() if needed else 0
        return "deployed", "folded for good: one convolution", (saved, None), unknown
    problem, plan = block.plan(x)
    forced = block.module_path_reason()
    if forced is not None:
        memory = eager.saved_bytes(problem), eager.transient_bytes(problem)
        return eager.NAME, f"through the submodules: {forced}", memory, unknown
    times = planner.times(problem) if plan.backend.NAME in planner.candidates(problem) else unknown
    reason = plan.reason
    if plan.backend is branches and problem.device == phases.DEVICE:
        reason += f"; {phases.chosen(problem.explicit())}"
    memory = plan.backend.saved_bytes(problem), plan.backend.transient_bytes(problem)
    return plan.backend.NAME, reason, memory, times


def _without_shape(name: str, block: ACBlock) -> BlockReport:
    forced = block.module_path_reason()
    if block.deploy:
        backend, reason = "deployed", "folded for good: one convolution"
    elif forced is not None:
        backend, reason = eager.NAME, f"through the submodules: {forced}"
    elif not any(norm.batch_stats for norm in block.step().norms):
        backend, reason = folded.NAME, "running statistics normalise"
    else:
        backend, reason = "?", "depends on the input: give explain() one, or its shape"
    return BlockReport(name, None, None, backend, reason, _parameters(block), None)


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
    times = (
        f"{known[block.backend]:.3g}" if block.backend in known else ""
        for known in (block.predicted, block.measured)
    )
    return block.name, *shapes, block.backend, f"{block.parameters:,}", *memory, *times, block.reason


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table, columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
