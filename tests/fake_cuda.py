"""A CUDA device whose time is simulated: launches take the host's, kernels the device's; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


class FakeCuda:
    """Replaces torch.cuda's stream of events, and the host's clock; times are in milliseconds."""

    SLEEP = 2.0  # what any sleep takes

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0  # now, and when the device will have done what is launched
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.wait())
        monkeypatch.setattr("acnet_kernels.backends.timer.cuda_sleep", lambda _: self.launch(0, self.SLEEP))
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        monkeypatch.setattr("time.perf_counter_ns", lambda: round(self.host * 1e6))

    def wait(self) -> None:
        self.host = max(self.host, self.free)

    def launch(self, host: float, device: float) -> None:
        """A launch that takes the host and then the device so long."""
        self.host += host
        self.free = max(self.free, self.host) + device

    def kernels(self, count: int, host: float, device: float) -> Callable[[], None]:
        """A call that launches so many."""

        def call() -> None:
            for _ in range(count):
                self.launch(host, device)

        return call


class Event:
    """When the device has done all that was launched before it was recorded."""

    def __init__(self, device: FakeCuda) -> None:
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.free, self.device.host)

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at
