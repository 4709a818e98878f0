"""Which releases stay on the broker."""

from hypothesis import given
from hypothesis import strategies as st

from aggregator.retention import GRACE, Kept, withdrawals

NOW = 1_800_000_000.0


def kept(*ages: float | None, size: int = 100) -> list[Kept]:
    """Releases that were replaced so many seconds ago, newest first."""
    return [Kept(1, 50 - number, size, None if age is None else NOW - age) for number, age in enumerate(ages)]


def test_replaced_ones_go_after_their_hour() -> None:
    """The newest two stay however old they are; the others an hour."""
    found = kept(None, 9999, 3599, 3600)
    gone, again = withdrawals(found, NOW, 2, 10**9)
    assert gone == [found[3]]
    assert again == NOW + 1


def test_the_budget_ends_the_hour() -> None:
    """Above it the oldest go at once, as many as it takes; the newest stay whatever they weigh."""
    found = kept(None, 1, 2, 3, size=400)
    assert withdrawals(found, NOW, 2, 1200)[0] == [found[3]]
    assert withdrawals(found, NOW, 2, 1)[0] == [found[3], found[2]]


def test_without_chunks_there_is_nothing_to_keep() -> None:
    """What travelled in a message is gone from the broker as soon as the next one is there."""
    found = kept(None, 1, 2, size=0)
    assert withdrawals(found, NOW, 2, 10**9) == ([found[2]], None)


def test_a_clock_that_was_set_keeps_them_longer_at_most() -> None:
    """What was replaced in the future waits for its hour; nothing of the newest goes."""
    found = kept(None, -500, -500)
    gone, again = withdrawals(found, NOW, 2, 10**9)
    assert (gone, again) == ([], NOW + 500 + GRACE)


@given(st.lists(st.floats(-1e9, 1e9), max_size=20), st.integers(2, 5), st.integers(0, 3000))
def test_the_newest_always_stay(ages: list[float], keep: int, budget: int) -> None:
    """And what is withdrawn is older than its hour, or above the budget."""
    found = kept(None, *ages)
    gone, again = withdrawals(found, NOW, keep, budget)
    assert not set(found[:keep]) & set(gone)
    left = [each for each in found[keep:] if each not in gone]
    assert (again is None) == (not left)
    if left:
        assert sum(each.size for each in found if each not in gone) <= budget
