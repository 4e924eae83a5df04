"""Every test starts from the same random state and without the user's tuned times."""

import os

import pytest
import torch

from acnet_kernels.backends import convolution


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; part of the suite, left out by -m 'not slow'")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision convolutions by the vendor's own, as on a GPU or a CPU with AMX, wherever the tests run."""
    monkeypatch.setattr(convolution, "_SLOW_HALF_TYPES", frozenset())


@pytest.fixture(autouse=True, scope="session")
def _no_tuned_times(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ACNET_KERNELS_CACHE"] = str(tmp_path_factory.mktemp("tuned"))
