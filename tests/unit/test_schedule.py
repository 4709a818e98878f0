"""edge_agent.schedule: an edge is announced once, however late, and a clock that was set plans it anew."""

import queue
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from edge_agent.calendar import Window
from edge_agent.schedule import Schedule, WindowEdge
from shared.machine import Instant

NIGHT = (Window.parse("22:00-06:00"),)
NOON = datetime(2036, 3, 3, 12, 0, tzinfo=UTC)
"""Far from the clock of whoever runs this, so that nothing is due by itself."""


def at(moment: datetime, mono: float = 0.0) -> Instant:
    """`moment` on both clocks."""
    return Instant(mono, moment.timestamp())


def test_plans_the_next_edge() -> None:
    """At noon the next edge is the opening, after it the closing."""
    schedule = Schedule(NIGHT, UTC, lambda event: None)
    schedule.start(at(NOON))
    try:
        assert schedule.planned == NOON.replace(hour=22)
        schedule.plan(at(NOON.replace(hour=22)))
        assert schedule.planned == NOON.replace(hour=6) + timedelta(days=1)
    finally:
        schedule.stop()


def test_edge_that_was_slept_through_is_announced_once() -> None:
    """After years of suspend the event still comes, and only once: late is not never."""
    events: queue.SimpleQueue[WindowEdge] = queue.SimpleQueue()
    schedule = Schedule(NIGHT, UTC, events.put)
    schedule.start(at(datetime(2020, 3, 3, 12, 0, tzinfo=UTC)))
    try:
        assert events.get(timeout=20) == WindowEdge()
    finally:
        schedule.stop()
    assert events.empty()
    assert schedule.planned is None


def test_clock_that_was_set_plans_anew() -> None:
    """Set back by years, the edge moves with it; a drift that NTP may cause changes nothing."""
    schedule = Schedule(NIGHT, UTC, lambda event: None)
    schedule.start(at(NOON, mono=100.0))
    try:
        assert not schedule.watch(at(NOON + timedelta(seconds=61), mono=160.0))
        assert schedule.planned == NOON.replace(hour=22)
        back = NOON - timedelta(days=900)
        assert schedule.watch(at(back, mono=170.0))
        assert schedule.planned == back.replace(hour=22)
        assert not schedule.watch(at(back + timedelta(seconds=10), mono=180.0))
    finally:
        schedule.stop()


def test_sleep_is_a_jump() -> None:
    """While a device sleeps the steady clock stands still: on waking up the next edge is the one after, at once."""
    schedule = Schedule(NIGHT, UTC, lambda event: None)
    schedule.start(at(NOON, mono=100.0))
    try:
        assert schedule.watch(at(NOON + timedelta(hours=11), mono=105.0))
        assert schedule.planned == NOON.replace(hour=6) + timedelta(days=1)
    finally:
        schedule.stop()


def test_clock_that_jumps_over_an_edge_leaves_none_behind() -> None:
    """Set forward past an opening and a closing, the next opening is planned; set back, the first one again."""
    schedule = Schedule(NIGHT, UTC, lambda event: None)
    schedule.start(at(NOON, mono=100.0))
    try:
        assert schedule.watch(at(NOON + timedelta(days=3), mono=101.0))
        assert schedule.planned == NOON.replace(hour=22) + timedelta(days=3)
        assert schedule.watch(at(NOON + timedelta(seconds=2), mono=102.0))
        assert schedule.planned == NOON.replace(hour=22)
    finally:
        schedule.stop()


@pytest.mark.parametrize(
    ("noon", "opens", "closes"),
    [
        ("2036-03-29 12:00", "2036-03-29 21:00", "2036-03-30 04:00"),
        ("2036-10-25 12:00", "2036-10-25 20:00", "2036-10-26 05:00"),
    ],
    ids=["spring", "autumn"],
)
def test_edges_follow_the_clock_on_site(noon: str, opens: str, closes: str) -> None:
    """22:00 and 06:00 in Berlin, in UTC: on the nights on which its clocks change they lie 7 and 9 hours apart."""
    schedule = Schedule(NIGHT, ZoneInfo("Europe/Berlin"), lambda event: None)
    moments = [datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (noon, opens, closes)]
    schedule.start(at(moments[0]))
    try:
        assert schedule.planned == moments[1]
        schedule.plan(at(moments[1]))
        assert schedule.planned == moments[2]
    finally:
        schedule.stop()


def test_weekdays_are_those_on_site() -> None:
    """Friday 22:30 in Berlin is still Friday though UTC is an hour behind, and Sunday evening brings no window."""
    weeknights = (Window.parse("mon-fri 23:30-05:00"),)
    schedule = Schedule(weeknights, ZoneInfo("Europe/Berlin"), lambda event: None)
    friday = datetime(2036, 3, 7, 12, 0, tzinfo=UTC)
    schedule.start(at(friday))
    try:
        assert schedule.planned == friday.replace(hour=22, minute=30)
        closes = friday.replace(hour=4) + timedelta(days=1)
        schedule.plan(at(friday.replace(hour=22, minute=30)))
        assert schedule.planned == closes
        schedule.plan(at(closes))
        assert schedule.planned == friday.replace(hour=22, minute=30) + timedelta(days=3)
    finally:
        schedule.stop()


def test_without_windows_there_is_no_thread() -> None:
    """A device that may always train wakes for no calendar."""
    schedule = Schedule((), UTC, lambda event: None)
    schedule.start(at(NOON))
    assert schedule.planned is None
    assert schedule.watch(at(NOON + timedelta(days=1)))
    schedule.stop()


def test_windows_that_never_end_plan_nothing() -> None:
    """All day, every day, has no edges."""
    schedule = Schedule((Window.parse("00:00-24:00"),), UTC, lambda event: None)
    schedule.start(at(NOON))
    try:
        assert schedule.planned is None
    finally:
        schedule.stop()
