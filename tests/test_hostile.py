"""Operators called with wrong arguments raise, and answer nothing undefined; hostile.py says how it is judged."""

import subprocess
import sys
from pathlib import Path

from operator_cases import CASES, operators

HOSTILE = Path(__file__).parent / "hostile.py"


def test_every_registered_operator_has_a_case():
    assert set(operators()) == set(CASES)


def test_every_wrong_argument_and_random_calls_are_refused_or_answered():
    command = [sys.executable, str(HOSTILE), "every", "random", "--calls", "500"]  # one start, which takes seconds
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " calls ended well, 0 did not" in run.stdout
