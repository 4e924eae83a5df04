"""A clock that does not time: what each backend is said to take, while its step still runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from acnet_kernels.backends import timer


class FakeClock:
    """Replaces timer.milliseconds. `milliseconds` is by backend; one that is not named is out of memory.

    `calls` are the backends of the calls, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, milliseconds: Mapping[str, float]) -> None:
        self.milliseconds, self.calls = milliseconds, []
        monkeypatch.setattr(timer, "milliseconds", self._take)

    def _take(self, call: Callable[[], None], device: torch.device) -> float:
        name = call.args[0].NAME  # type: ignore[attr-defined]
        self.calls.append(name)
        if name not in self.milliseconds:
            raise torch.OutOfMemoryError(f"no memory for {name}")
        if self.calls.count(name) <= timer.WARM_UP:
            call()
        return self.milliseconds[name]
