"""doctor: every line says what was found, or what is missing."""

import torch

from acnet_kernels import doctor


def test_report_names_versions_and_the_extension(capsys):
    lines = dict(doctor.report())
    assert lines["torch"].startswith(torch.__version__)
    assert lines["extension"]
    assert doctor.main() == 0
    assert "C++ compiler" in capsys.readouterr().out


def test_missing_tools_are_said_to_be_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    lines = dict(doctor.report())
    assert lines["C++ compiler"] == "not found (c++, g++, clang++)"
    assert lines["nvcc"] == "not found (nvcc)"
