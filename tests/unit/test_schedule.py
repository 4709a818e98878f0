"""edge_agent.schedule: an edge is announced once, however late, and a clock that was set plans it anew."""

import queue
from datetime import UTC, datetime, timedelta

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
