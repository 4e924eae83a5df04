"""A step captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def assert_replays(step: Callable[[], list[torch.Tensor]], x: torch.Tensor) -> None:
    """Captures a step that reads x, and replays it on another x: it gives what the step gives outside a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
