"""edge_agent.calendar: windows mean what the wall clock on site reads, on every day of the year."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.calendar import DAYS, EVERY_DAY, Window, inside, next_edge

BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = (Window.parse("22:00-06:00"),)

windows = st.builds(
    Window,
    st.frozensets(st.integers(0, 6), min_size=1),
    st.integers(0, 1439),
    st.integers(0, 1440),
).filter(lambda window: window.start != window.end)
seconds = st.integers(1_577_836_800, 1_893_456_000) | st.integers(1_774_500_000, 1_775_500_000)
"""2020 to 2030, and often the days around the clock change of March 2026 (and of April in the south)."""
moments = seconds.map(lambda second: datetime.fromtimestamp(second, UTC))
zones = st.sampled_from(["Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"]).map(
    ZoneInfo
)


def berlin(text: str, fold: int = 0) -> datetime:
    """A moment by the wall clock of Berlin."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold)


@pytest.mark.parametrize(
    ("text", "days", "start", "end"),
    [
        ("22:00-06:00", "mon,tue,wed,thu,fri,sat,sun", 1320, 360),
        ("mon-fri 18:00-07:00", "mon,tue,wed,thu,fri", 1080, 420),
        ("sat,sun 00:00-24:00", "sat,sun", 0, 1440),
        ("Fri-Mon 9:30-10:00", "mon,fri,sat,sun", 570, 600),
    ],
)
def test_window_reads_as_written(text: str, days: str, start: int, end: int) -> None:
    """The documented forms give the days and times they say."""
    assert Window.parse(text) == Window(frozenset(map(DAYS.index, days.split(","))), start, end)


@pytest.mark.parametrize(
    "text",
    [
        *("", "22:00", "22:00-", "25:00-06:00", "24:01-06:00", "6-7", "06:00-06:00", "24:00-06:00", "06:60-07:00"),
        *("fry 06:00-07:00", "mon 06:00-07:00 now", "mon- 06:00-07:00", ",mon 06:00-07:00"),
    ],
)
def test_what_is_no_window_is_refused(text: str) -> None:
    """A window that means nothing, or nothing certain, is the operator's to mend."""
    with pytest.raises(ValueError, match=r"write|weekdays"):
        Window.parse(text)


@given(windows)
def test_text_and_window_are_the_same(window: Window) -> None:
    """parse(str(w)) = w."""
    assert Window.parse(str(window)) == window


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-03-02 21:59:59", False),
        ("2026-03-02 22:00:00", True),
        ("2026-03-03 05:59:59", True),
        ("2026-03-03 06:00:00", False),
    ],
)
def test_night_runs_over_midnight(now: str, expected: bool) -> None:
    """The start is inside, the end is not."""
    assert inside(NIGHT, berlin(now), BERLIN) is expected


def test_window_belongs_to_the_day_it_starts_on() -> None:
    """Friday's night ends on Saturday morning, and Sunday's never began."""
    weeknights = (Window.parse("mon-fri 18:00-07:00"),)
    assert inside(weeknights, berlin("2026-03-07 06:59"), BERLIN)
    assert not inside(weeknights, berlin("2026-03-07 18:30"), BERLIN)
    assert not inside(weeknights, berlin("2026-03-09 06:59"), BERLIN)


def test_window_may_leave_out_a_single_minute() -> None:
    """An end just before its start is on the next day."""
    windows = (Window.parse("12:01-12:00"),)
    assert inside(windows, berlin("2026-03-02 11:59"), BERLIN)
    assert not inside(windows, berlin("2026-03-02 12:00"), BERLIN)
    assert inside(windows, berlin("2026-03-02 12:01"), BERLIN)


def test_the_zone_decides_not_the_moments_own() -> None:
    """21:30 UTC in winter is 22:30 in Berlin."""
    now = datetime(2026, 1, 5, 21, 30, tzinfo=UTC)
    assert inside(NIGHT, now, BERLIN)
    assert not inside(NIGHT, now, UTC)


def test_no_windows_mean_always_and_never_change() -> None:
    """An empty calendar is no constraint; nor does a full one ever change."""
    now = berlin("2026-03-02 12:00")
    always = (Window(EVERY_DAY, 0, 1440),)
    assert inside((), now, BERLIN)
    assert next_edge((), now, BERLIN) is None
    assert inside(always, now, BERLIN)
    assert next_edge(always, now, BERLIN) is None


def test_spring_night_is_an_hour_shorter() -> None:
    """On 29 March 2026 the clocks skip 02:00 to 03:00, so 22:00-06:00 lasts seven hours."""
    opens = next_edge(NIGHT, berlin("2026-03-28 12:00"), BERLIN)
    assert opens == berlin("2026-03-28 22:00")
    assert next_edge(NIGHT, opens, BERLIN) == opens + timedelta(hours=7)


def test_autumn_night_is_an_hour_longer() -> None:
    """On 25 October 2026 the clocks repeat 02:00 to 03:00, so 22:00-06:00 lasts nine hours."""
    opens = next_edge(NIGHT, berlin("2026-10-24 12:00"), BERLIN)
    assert opens == berlin("2026-10-24 22:00")
    assert next_edge(NIGHT, opens, BERLIN) == opens + timedelta(hours=9)


def test_clock_may_jump_into_a_window() -> None:
    """A window that starts inside the skipped hour opens when the clock jumps past its start."""
    windows = (Window.parse("02:30-04:00"),)
    opens = next_edge(windows, berlin("2026-03-29 00:00"), BERLIN)
    assert opens == datetime(2026, 3, 29, 1, 0, tzinfo=UTC)


def test_repeated_hour_counts_both_times() -> None:
    """A window inside the hour that is read twice opens twice."""
    windows = (Window.parse("02:15-02:45"),)
    edges = [berlin("2026-10-25 00:00").astimezone(UTC)]
    for _ in range(4):
        edge = next_edge(windows, edges[-1], BERLIN)
        assert edge is not None
        edges.append(edge)
    assert [f"{edge.astimezone(BERLIN):%H:%M}" for edge in edges[1:]] == ["02:15", "02:45", "02:15", "02:45"]
    assert edges[4] - edges[1] == timedelta(hours=1, minutes=30)


@given(st.lists(windows, min_size=1, max_size=3), moments, zones)
def test_next_edge_is_the_first_change(found: list[Window], now: datetime, zone: ZoneInfo) -> None:
    """Nothing changes before the edge, something does at it: compared with looking at every quarter of an hour."""
    edge = next_edge(found, now, zone)
    before = inside(found, now, zone)
    if edge is not None:
        assert edge > now
        assert inside(found, edge, zone) is not before
        assert inside(found, edge - timedelta(microseconds=1), zone) is before
    moment, last = now, edge or now + timedelta(days=8)
    while moment < last:
        assert inside(found, moment, zone) is before
        moment += timedelta(minutes=15)
