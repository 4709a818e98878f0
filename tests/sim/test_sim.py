"""A thousand seeded schedules of whole fleets under faults. What must never come of one: see tests.sim.judge.

A schedule that fails names its seed and how to replay it.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.sim import run
from tests.sim.schedule import Fleet, checked

SCHEDULES, TOGETHER = 1_000, 25


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Keys and bundles that all schedules share, in memory where there is a file system for that."""
    with run.place() as folder:
        yield Fleet.make(folder)


@pytest.mark.parametrize("first", range(0, SCHEDULES, TOGETHER))
def test_schedules(site: Fleet, first: int) -> None:
    """Whatever fails, and whenever: nothing accepted is lost or counted twice, nothing goes back, no round hangs."""
    seen: Counter[str] = Counter()
    for seed in range(first, first + TOGETHER):
        seen += Counter(checked(seed, site))
    # A schedule in which nothing goes wrong proves nothing.
    assert seen["accepted"] and seen["crashes"] and seen["released"]


def test_the_same_seed_is_the_same_schedule(site: Fleet) -> None:
    """A failure can be replayed, line by line; only names from a sealed body and the length of a signature differ."""
    for seed in range(3):
        assert _trace(seed, site) == _trace(seed, site)


def _trace(seed: int, site: Fleet) -> list[str]:
    lines: list[str] = []
    checked(seed, site, lambda line: lines.append(re.sub("[0-9a-f]{16,}|/head bytes=[0-9]+", "...", line)))
    return lines


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_for_as_long_as_asked() -> None:
    """FIELDFARE_SOAK_SECONDS (600 by default) of schedules that no run before has seen, on every core."""
    first = random.SystemRandom().randrange(10**6, 10**9)
    seconds = float(os.environ.get("FIELDFARE_SOAK_SECONDS", "600"))
    seen = run.many(iter(range(first, first + 10**7)), seconds, os.cpu_count() or 1)
    assert seen["schedules"]
