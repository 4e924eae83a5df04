"""Every test starts from the same random state and without the user's tuned times."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; part of the suite, left out by -m 'not slow'")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_tuned_times(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ACNET_KERNELS_CACHE"] = str(tmp_path_factory.mktemp("tuned"))
