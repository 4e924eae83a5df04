"""Launches into a driver that keeps them, in a process of its own with ACNET_RECORDING=1 (tests/test_launch.py)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore_glob = [] if os.environ.get("ACNET_RECORDING") == "1" else ["test_*.py"]
if not collect_ignore_glob:
    sys.path.append(str(HERE.parent / "triton"))  # its problems
    from recording import Driver

    DRIVER = Driver()


@pytest.fixture
def driver() -> Iterator[Driver]:
    DRIVER.take()
    yield DRIVER
    DRIVER.use_stream(0)
