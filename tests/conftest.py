"""Every test starts from the same random state, and leaves the number of threads alone."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
