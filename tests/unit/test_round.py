"""The contract of one round."""

from hypothesis import given
from hypothesis import strategies as st

from aggregator.round import DUPLICATE, Round, Verdict
from shared.errors import Reason
from shared.messages import PARTICIPATION_ALL, Outcome, Plan
from shared.selection import draw

PLAN = Plan(goal=3, min_updates=2, rounds=5, deadline=60, max_extension=200, over_select=1.3)


def opened(participation: int = PARTICIPATION_ALL, plan: Plan = PLAN) -> Round:
    """A fresh round."""
    return Round("points", 1, 1, plan, participation, deadline=60.0, opened=0.0)


def test_one_update_for_each_device() -> None:
    """The same head again is accepted again, another one is a duplicate, and neither counts twice."""
    found = opened()
    assert found.judge("a", b"1") is None
    assert found.accept("a", b"1") == 1
    assert found.judge("a", b"1") == Verdict(Outcome.ACCEPTED)
    assert found.judge("a", b"2") == DUPLICATE
    assert len(found.accepted) == 1


def test_a_rejected_device_has_had_its_turn() -> None:
    """The same head again gets its first answer with its reason, another one is a duplicate; neither counts."""
    found = opened()
    found.reject("a", b"1", Reason.NORM)
    assert found.judge("a", b"1") == Verdict(Outcome.REJECTED, "norm")
    assert found.judge("a", b"2") == DUPLICATE
    assert found.judge("b", b"1") is None
    assert found.accepted == {}


def test_only_the_selected() -> None:
    """A device above the participation is told so, whatever it sends."""
    number = draw("points", 1, 1, "a")
    assert opened(number).judge("a", b"1") == Verdict(Outcome.NOT_SELECTED, "not_selected")
    assert opened(number + 1).judge("a", b"1") is None


def test_goal_and_minimum() -> None:
    """Two of three are enough at the deadline, three close it at once."""
    found = opened()
    states = []
    for device in ("a", "b", "c"):
        found.accept(device, device.encode())
        states.append((found.enough, found.full))
    assert states == [(False, False), (True, False), (True, True)]


def test_extensions_double_up_to_their_bound() -> None:
    """A starved round waits longer each time, never for ever, and keeps what it has."""
    found = opened()
    found.accept("a", b"1")
    assert not found.starved
    assert [found.extend(100.0) for _ in range(4)] == [60.0, 120.0, 200.0, 200.0]
    assert found.deadline == 300.0
    assert found.starved
    assert list(found.accepted) == ["a"]


def test_extensions_never_overflow() -> None:
    """After years of starving the wait is still the bound."""
    found = opened()
    found.extensions = 10**6
    assert found.extend(0.0) == 200.0


@given(st.sets(st.text("abcdef", min_size=1, max_size=3), max_size=30), st.integers(0, 30))
def test_participation_only_rises_and_admits_enough(live: set[str], done: int) -> None:
    """It selects ceil(goal x over_select) of those live or done (all if fewer), never fewer than before."""
    found = opened(0)
    for device in sorted(live)[:done]:
        found.accept(device, b"x")
    found.participation = found.wider(live)
    assert sum(found.selected(device) for device in live) == min(len(live), found.want)
    assert found.want == 4
    before = found.participation
    assert found.wider(set()) >= before
