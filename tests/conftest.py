"""Every test starts from the same random state, and leaves the number of threads alone."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; part of the suite, left out by -m 'not slow'")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
