"""SyncBatchNorm over NCCL, one process a device: the comparisons of test_distributed.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_distributed import check_synced

WORLDS = range(1, max(1, min(torch.cuda.device_count(), 8)) + 1)


@pytest.mark.parametrize("world", WORLDS)
def test_synced_norms_equal_one_process_with_the_whole_batch(world, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # here; distributed.py does in the processes
    check_synced(world, "nccl")
