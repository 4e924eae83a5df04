"""What a step is made of: every operator's time, arithmetic and traffic, summed by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .harness import Clock

# ATen's operators → the phase that they are; ours keep their names, everything else is OTHER.
OTHER = "elementwise"
PHASES = {
    **dict.fromkeys(("convolution", "conv2d"), "convolution forward"),
    "convolution_backward": "convolution backward",
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), "batch norm forward"),
    **dict.fromkeys(("native_batch_norm_backward", "cudnn_batch_norm_backward"), "batch norm backward"),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "matmul"), "matrix products"),
}
CONVOLUTIONS = ("convolution forward", "convolution backward")
OURS = "acnet_kernels"
# Our convolutions of all branches → their output-sized maps and their weights.
WINDOWED: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "triton_forward": lambda args, out: (out[1], args[1:4]),
    "triton_input_grad": lambda args, out: (args[0], args[1]),
    "triton_weight_grads": lambda args, out: (args[1], args[2]),
}


@dataclass
class Phase:
    """What one phase of one step takes: own time, floating-point operations, bytes of its inputs and outputs."""

    milliseconds: float = 0.0
    flops: int = 0
    nbytes: int = 0


def tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)


def flops(name: str, args: tuple[Any, ...], out: Any) -> int:
    """Of an operator that is made of multiply-adds, counted as two; 0 for all others."""
    if name in ("convolution", "conv2d"):
        return 2 * out.numel() * args[1][0].numel()
    if name == "convolution_backward":
        return 2 * args[0].numel() * args[2][0].numel() * sum(args[10][:2])
    if name in ("mm", "bmm", "matmul"):
        return 2 * out.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * out.numel() * args[1].shape[-1]
    if name == "cross_correlation":  # one product a pixel, shift and pair of channels
        return 2 * out[0].numel() * args[0].numel() // args[0].shape[1]
    if name in WINDOWED:
        maps, weights = WINDOWED[name](args, out)
        return 2 * maps[0].numel() // maps[0].shape[1] * sum(w.numel() for w in weights if w is not None)
    return 0


class Recorder(TorchDispatchMode):
    """Times every operator of what runs within it, those inside our own operators too."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.phases: dict[str, Phase] = {}
        self._inner = [0.0]  # milliseconds spent in operators called by the one that runs, one level an entry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out: Any = None
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]

        def run() -> None:
            nonlocal out
            if namespace != OURS:
                out = func(*args, **(kwargs or {}))
                return
            device = next(tensors(args)).device.type
            keys = torch._C.DispatchKeySet(torch._C._parse_dispatch_key(device.upper()))
            with self:  # straight to the kernel, past this mode, which the operators in the kernel meet again
                out = func.redispatch(keys, *args, **(kwargs or {}))

        self._inner.append(0.0)
        spent = self.clock.milliseconds(run)
        own = spent - self._inner.pop()
        self._inner[-1] += spent
        phase = self.phases.setdefault(name if namespace == OURS else PHASES.get(name, OTHER), Phase())
        phase.milliseconds += own
        phase.flops += flops(name, args, out)
        if not func.is_view:
            phase.nbytes += sum(t.nbytes for t in tensors([*args, out]))
        return out


def record(step: Callable[[], Any], clock: Clock, seconds: float = 0.3, most: int = 5) -> dict[str, Phase]:
    """The phases of a step, by falling time.

    Each time is the median of as many steps as begin within the seconds, of `most` at the most.
    """
    runs: list[dict[str, Phase]] = []
    end = clock.seconds() + seconds
    while not runs or (len(runs) < most and clock.seconds() < end):
        with Recorder(clock) as recorder:
            step()
        runs.append(recorder.phases)
    found = {
        name: Phase(median(run[name].milliseconds for run in runs if name in run), phase.flops, phase.nbytes)
        for name, phase in runs[-1].items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].milliseconds))
