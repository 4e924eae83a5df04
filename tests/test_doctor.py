"""doctor: every line says what was found, or what is missing."""

import torch

from acnet_kernels import doctor
from acnet_kernels.backends import planner


def test_report_names_versions_and_every_backend(capsys):
    lines = dict(doctor.report())
    assert lines["torch"].startswith(torch.__version__)
    for name in planner.BACKENDS:
        assert lines[f"backend {name}"]
    assert lines["backend eager"] == "can run here"
    assert doctor.main() == 0
    assert "C++ compiler" in capsys.readouterr().out


def test_missing_tools_are_said_to_be_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    lines = dict(doctor.report())
    assert lines["C++ compiler"] == "not found (c++, g++, clang++)"
    assert lines["nvcc"] == "not found (nvcc)"


def test_unavailable_backends_say_why(monkeypatch):
    monkeypatch.setattr(planner.BACKENDS["folded"], "unavailable", lambda: "no such thing here")
    assert dict(doctor.report())["backend folded"] == "no such thing here"
