"""A million inputs and more for every parser (`make soak`)."""

import subprocess
import sys

import pytest

from tests.fuzz.targets import TARGETS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7_200)]


@pytest.mark.parametrize("name", TARGETS)
def test_soak(name: str) -> None:
    """No input of so many breaks a promise, takes too long or makes the process grow."""
    target = TARGETS[name]
    command = [sys.executable, "-m", "tests.fuzz.run", "--only", name, "--inputs", str(target.soak), "--jobs", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{ran.stdout[-1_000:]}\n{ran.stderr[-4_000:]}"
