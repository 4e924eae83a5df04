"""A pytest plugin, for a run that may be cut off: a test's outcome is a row, its failure a line, when it is known.

GPU_SUITE_OUT names the directory of gpu_suite.csv.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from . import harness
from .gpu_suite import CSV


class Outcomes:
    """Writes the rows, in the one process that hears of every test."""

    def __init__(self, path: Path) -> None:
        self.rows = harness.Report("cuda" if torch.cuda.is_available() else "cpu", path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row a test: its call's, or that of the setup that kept it from being called."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.rows.add(report.nodeid, report.outcome, "", "", "", "seconds", report.duration)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)
            print(f"\nFAILED {report.nodeid}: {said[:400]}", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin but in xdist's workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(os.environ["GPU_SUITE_OUT"]) / CSV))
