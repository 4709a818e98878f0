"""edge_agent.budget: each second is paid for once, and no restart or set clock gives a day's budget a second time."""

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.budget import BUDGET_FILE, STEP, Budget, Spending, charged

MONDAY = date(2026, 3, 2)
DAY = timedelta(days=1)
BERLIN = ZoneInfo("Europe/Berlin")


def test_seconds_are_charged_once(tmp_path: Path) -> None:
    """The sum so far comes in; a trainer that is missing from it for a moment is not paid for twice."""
    budget = Budget(tmp_path, 600.0)
    sums = (5.0, 15.0, 15.0, 5.0, 25.0)
    assert [budget.charge(total, MONDAY) for total in sums] == [0.0, 10.0, 10.0, 10.0, 20.0]
    assert budget.charge(None, MONDAY) is None


def test_midnight_on_site_begins_a_new_day(tmp_path: Path) -> None:
    """Not midnight in UTC, and not 24 hours later: in Berlin 29 March 2026 has 23 hours and 25 October has 25."""
    for start, hours in ((datetime(2026, 3, 28, 23, tzinfo=UTC), 23), (datetime(2026, 10, 24, 22, tzinfo=UTC), 25)):
        spent = Spending((start - timedelta(seconds=1)).astimezone(BERLIN).date(), 500.0)
        spent = charged(spent, 1.0, start.astimezone(BERLIN).date())
        assert spent.seconds == 1.0
        last = start + timedelta(hours=hours) - timedelta(seconds=1)
        assert charged(spent, 1.0, last.astimezone(BERLIN).date()).seconds == 2.0
        assert charged(spent, 1.0, (last + timedelta(seconds=1)).astimezone(BERLIN).date()).seconds == 1.0


def test_a_clock_that_is_set_back_gives_nothing() -> None:
    """A midnight that comes twice is a new day once; and a clock that was years ahead does not stop the days."""
    monday = Spending(MONDAY, 500.0)
    tuesday = charged(monday, 10.0, MONDAY + DAY)
    assert tuesday == Spending(MONDAY + DAY, 10.0)
    again = charged(tuesday, 10.0, MONDAY)
    assert again == Spending(MONDAY + DAY, 20.0)
    assert charged(again, 10.0, MONDAY + DAY).seconds == 30.0
    mended = charged(Spending(date(2099, 1, 1), 500.0), 1.0, MONDAY)
    assert mended == Spending(MONDAY, 501.0)
    assert charged(mended, 1.0, MONDAY + DAY) == Spending(MONDAY + DAY, 1.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from([-1, 0, 1])), max_size=30))
def test_a_day_is_begun_once(steps: list[tuple[float, int]]) -> None:
    """However the clock flickers by a day around midnight, the account is emptied once for each day it reaches."""
    spent, newest, emptied, today = Spending(MONDAY, 0.0), MONDAY, 0, MONDAY
    for used, step in steps:
        today = min(max(today + step * DAY, newest - DAY), newest + DAY)
        after = charged(spent, used, today)
        emptied += after.day != spent.day
        if after.day == spent.day:
            assert after.seconds == spent.seconds + used
        newest, spent = max(newest, today), after
    assert emptied == (newest - MONDAY).days


def test_a_restart_gives_nothing_back(tmp_path: Path) -> None:
    """In order, to the second; after a crash, what was on record ahead is lost and never less than was used."""
    budget = Budget(tmp_path, 600.0)
    budget.charge(0.0, MONDAY)
    budget.charge(100.0, MONDAY)
    crashed = Budget(tmp_path, 600.0).charge(0.0, MONDAY)
    assert crashed == 100.0 + STEP
    budget.close()
    assert Budget(tmp_path, 600.0).charge(0.0, MONDAY) == 100.0
    assert Budget(tmp_path, 600.0).charge(0.0, MONDAY + DAY) == 0.0


def test_it_writes_seldom(tmp_path: Path) -> None:
    """Looks come every 0.8 s; a card is written once for STEP seconds, and not at all without a limit."""
    budget, free = Budget(tmp_path, 600.0), Budget(tmp_path / "free", 0.0)
    (tmp_path / "free").mkdir()
    written = set()
    for look in range(200):
        assert budget.charge(look * 0.8, MONDAY) == free.charge(look * 0.8, MONDAY)
        file = tmp_path / BUDGET_FILE
        written |= {file.read_bytes()} if file.exists() else set()
    free.close()
    assert len(written) == -(-200 * 0.8 // STEP)
    assert list((tmp_path / "free").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"{}", b'{"day": "2026-03-02"}', b'{"day": 1, "seconds": 1}', b'{"day": "x", "seconds": 1}']
    + [b'{"day": "2026-03-02", "seconds": NaN}', b'{"day": "2026-03-02", "seconds": -5}', b"\xff" * 9, b"[" * 900]
    + [b'{"day": "2026-03-02", "seconds": 1e999}', b'{"day": "2026-03-02", "seconds": 1' + b"0" * 400 + b"}"],
)
def test_a_record_that_cannot_be_read_is_a_budget_spent(tmp_path: Path, text: bytes) -> None:
    """Until midnight: nobody knows what was used, and the limit is the owner's."""
    (tmp_path / BUDGET_FILE).write_bytes(text)
    budget = Budget(tmp_path, 600.0)
    assert budget.charge(0.0, MONDAY) == 600.0
    assert budget.charge(1.0, MONDAY + DAY) == 1.0


def test_a_disk_that_refuses_is_asked_again(tmp_path: Path) -> None:
    """The figure in memory counts meanwhile."""
    folder = tmp_path / "state"
    budget = Budget(folder, 600.0)
    budget.charge(0.0, MONDAY)
    assert budget.charge(10.0, MONDAY) == 10.0
    folder.mkdir()
    assert budget.charge(11.0, MONDAY) == 11.0
    assert json.loads((folder / BUDGET_FILE).read_text()) == {"day": "2026-03-02", "seconds": 11.0 + STEP}
