"""The benchmarks' harness: rows and their file."""

import pytest
import torch

from benchmarks import harness


def test_rows_survive_their_file(tmp_path):
    report = harness.Report()
    report.add(
        "ours", "step", "8x16x8x8->16 /2", torch.bfloat16, "nchw", "time_ms", harness.Samples((1.0, 2.0, 4.0), "99")
    )
    report.add("eager, with a comma", "forward", "s", torch.float32, "nchw", "saved_bytes", 12.0)
    path = tmp_path / "a.csv"
    report.write_csv(path)
    assert harness.read_csv(path) == report.rows
    assert path.read_text().splitlines()[0] == (
        "contender,mode,shape,dtype,layout,metric,p20,p50,p80,device,torch,triton,cudnn,driver,clock,command,date"
    )
    first, second = report.rows
    assert (first.p20, first.p50, first.p80, first.clock) == (pytest.approx(1.4), 2.0, pytest.approx(3.2), "99")
    assert (second.p20, second.p50, second.p80, second.clock) == (12.0, 12.0, 12.0, "")


def test_a_file_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("contender,mode\nours,step\n")
    with pytest.raises(ValueError, match="must have the columns contender, mode"):
        harness.read_csv(path)
