"""aggregator.admission: one address cannot keep others out, nor make the table of addresses grow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.admission import Admission, Pace, network_of


def admission(**changes: float) -> Admission:
    """Two at once and one a second for each address."""
    limits = {"rate": 1.0, "burst": 2, "total": 100, "each": 100, "networks": 8} | changes
    return Admission(**limits)  # type: ignore[arg-type]


def test_who_comes_too_often_is_told_so_then_dropped() -> None:
    """A burst is served, as many again are answered, all else is dropped; time makes it good."""
    door = admission()
    verdicts = [door.came("a", 0.0) for _ in range(6)]
    assert verdicts == ["serve", "serve", "answer", "answer", "drop", "drop"]
    assert door.came("b", 0.0) == "serve"
    assert door.came("a", 1.0) == "answer"
    assert door.came("a", 10.0) == "serve"


def test_a_clock_that_stands_gives_nothing() -> None:
    """Time that goes backwards neither takes nor gives."""
    door = admission()
    assert [door.came("a", 5.0), door.came("a", 4.0), door.came("a", 3.0)] == ["serve", "serve", "answer"]


def test_open_connections_are_bounded() -> None:
    """For one address and for all; who leaves makes room."""
    door = admission(burst=50, each=2, total=3)
    assert [door.came("a", 0.0) for _ in range(3)] == ["serve", "serve", "drop"]
    assert [door.came(each, 0.0) for each in "bc"] == ["serve", "drop"]
    door.left("a")
    assert door.came("c", 0.0) == "serve"


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=80))
def test_memory_is_bounded(steps: list[tuple[int, bool]]) -> None:
    """However many addresses come, few are remembered, and no connection is counted wrong."""
    door = admission(total=5, each=3, burst=1000)
    held: list[str] = []
    for number, leave in steps:
        if leave and held:
            door.left(held.pop(0))
        elif door.came(str(number), 0.0) != "drop":
            held.append(str(number))
        assert len(held) <= 5 and len(door) <= 8
        assert all(held.count(each) <= 3 for each in held)


def test_the_longest_away_is_forgotten_first() -> None:
    """A thousand addresses leave eight behind; who is connected is never among those that are forgotten."""
    door = admission(burst=1)
    assert door.came("stays", 0.0) == "serve"
    for number in range(1000):
        assert door.came(str(number), 0.0) == "serve"
        door.left(str(number))
    assert len(door) == 8
    assert [door.came("stays", 0.0), door.came("0", 0.0)] == ["answer", "serve"]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("odd", "odd"),
    ],
)
def test_one_network_is_one_guest(address: str, network: str) -> None:
    """IPv4 as it is, IPv6 by /64."""
    assert network_of(address) == network


def test_a_pace_is_kept() -> None:
    """So many at once, so many a second after that."""
    pace = Pace(2.0, 2)
    assert [pace.allows(9.0), pace.allows(9.0), pace.allows(9.0), pace.allows(9.5)] == [True, True, False, True]
