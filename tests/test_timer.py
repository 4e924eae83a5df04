"""What the timer says of a CUDA device, on one whose time is simulated."""

import pytest
import torch
from fake_cuda import FakeCuda

from acnet_kernels.backends import timer

CUDA = torch.device("cuda")


@pytest.mark.parametrize("kernel", [0.01, 0.02, 0.04])
def test_short_kernels_are_ranked_by_their_own_time(kernel: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is far shorter than its launch, so that the device is idle in between unless launches queue up."""
    device = FakeCuda(monkeypatch)
    found = timer.taken(device.kernels(9, 0.1, kernel), CUDA)
    assert found == (pytest.approx(0.9), pytest.approx(9 * kernel))
    assert timer.milliseconds(device.kernels(9, 0.1, kernel), CUDA) == pytest.approx(0.9)


def test_long_kernels_hide_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCuda(monkeypatch)
    assert timer.taken(device.kernels(3, 0.1, 5), CUDA) == (pytest.approx(0.3), pytest.approx(15))
    assert timer.milliseconds(device.kernels(3, 0.1, 5), CUDA) == pytest.approx(15)


def test_launches_longer_than_the_queue_are_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCuda(monkeypatch)
    assert timer.milliseconds(device.kernels(100, 0.1, 0.01), CUDA) == pytest.approx(10)
