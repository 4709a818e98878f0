"""The list of bad inputs cannot rot: each of its lines names tests that pytest collects."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.bad_inputs import LIST, Later

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def collected() -> frozenset[str]:
    """Every test id of the files that the list names, with and without its case."""
    named = {name for tests in LIST.values() if not isinstance(tests, Later) for name in tests}
    files = sorted({name.partition("::")[0] for name in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "soak or not soak", *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2_000:]
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    return frozenset(ids) | frozenset(each.partition("[")[0] for each in ids)


@pytest.mark.parametrize("line", [line for line, tests in LIST.items() if not isinstance(tests, Later)])
def test_each_line_has_its_tests(collected: frozenset[str], line: str) -> None:
    """A test that is renamed or lost is missed here."""
    tests = LIST[line]
    assert tests and not isinstance(tests, Later)
    assert not [name for name in tests if name not in collected]


def test_what_is_not_covered_is_known() -> None:
    """A new hole in the list is seen in the review of this number."""
    assert sum(isinstance(tests, Later) for tests in LIST.values()) == 5
