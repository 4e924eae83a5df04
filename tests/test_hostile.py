"""Operators called with wrong arguments raise, and answer nothing undefined; hostile.py says how it is judged."""

import subprocess
import sys
from pathlib import Path

import pytest
from operator_cases import CASES, operators

PARTS = 2  # each a process, which takes seconds to start
HOSTILE = Path(__file__).parent / "hostile.py"


def hostile(*arguments):
    run = subprocess.run([sys.executable, str(HOSTILE), *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_every_registered_operator_has_a_case():
    assert set(operators()) == set(CASES)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_wrong_argument_is_refused_or_answered(part):
    hostile("every", *(f"--operator={name}" for name in operators()[part::PARTS]))


def test_random_calls():
    hostile("random", "--calls", "500")
