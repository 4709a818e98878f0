"""Weekly windows in the device's own time zone: whether a moment is inside one, and when that changes next.

Pure: the moment and the zone are arguments. A window is about what the wall clock on site reads, so daylight saving
needs no rule of its own: an hour that is repeated counts both times, one that is skipped not at all. A window whose
end is not after its start runs over midnight and belongs to the day on which it starts.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, time, timedelta, tzinfo
from itertools import pairwise
from typing import Self

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
EVERY_DAY = frozenset(range(7))

_HORIZON = 9
"""Days that hold a full week of windows and every change of offset between them."""

_TIME = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)")


class Window:
    """a window such as "22:00-06:00", "mon-fri 18:00-07:00" or "sat,sun 00:00-24:00"."""

    # Not a dataclass: a configuration writes it as text, and msgspec would make a table of one.
    __slots__ = ("days", "end", "start")

    def __init__(self, days: frozenset[int], start: int, end: int) -> None:
        """It starts on each of the weekdays `days` (0 is Monday); times are minutes after midnight.

        `start` is below 1440, `end` at most 1440; an `end` not after `start` is on the next day.
        """
        self.days, self.start, self.end = days, start, end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"Window.parse({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The window that `text` describes; ValueError with advice."""
        words = text.lower().split()
        if not 1 <= len(words) <= 2:
            raise ValueError(f'{text!r} is no window; write "22:00-06:00" or "mon-fri 18:00-07:00"')
        days = _days(words[0]) if len(words) == 2 else EVERY_DAY
        start, dash, end = words[-1].partition("-")
        if not dash:
            raise ValueError(f'{text!r} has no end; write "22:00-06:00"')
        window = cls(days, _minutes(start), _minutes(end))
        if window.start == window.end or window.start == 1440:
            raise ValueError(f'{text!r} is empty; for a whole day write "00:00-24:00"')
        return window

    def __str__(self) -> str:
        days = "" if self.days == EVERY_DAY else ",".join(DAYS[day] for day in sorted(self.days)) + " "
        return f"{days}{_clock(self.start)}-{_clock(self.end)}"

    def holds(self, day: int, minute: float) -> bool:
        """Whether a wall clock that reads `minute` minutes after midnight of weekday `day` is inside."""
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


def inside(windows: Sequence[Window], now: datetime, zone: tzinfo) -> bool:
    """Whether the aware moment `now` lies in one of the windows; no windows at all means always."""
    local = now.astimezone(zone)
    minute = local.hour * 60 + local.minute + local.second / 60 + local.microsecond / 60e6
    return not windows or any(window.holds(local.weekday(), minute) for window in windows)


def next_edge(windows: Sequence[Window], now: datetime, zone: tzinfo) -> datetime | None:
    """The first moment after `now`, in UTC, at which `inside` changes; None if it never does."""
    before = inside(windows, now, zone)
    for moment in sorted(set(_candidates(windows, now, zone))):
        if moment > now and inside(windows, moment, zone) != before:
            return moment
    return None


def _candidates(windows: Sequence[Window], now: datetime, zone: tzinfo) -> Iterator[datetime]:
    today = now.astimezone(zone).date()
    dates = [today + timedelta(days=day) for day in range(-1, _HORIZON)]
    marks = {minute % 1440 for window in windows for minute in (window.start, window.end)}
    for date in dates:
        for mark in marks:
            for fold in (0, 1):
                local = datetime.combine(date, time(mark // 60, mark % 60, fold=fold), tzinfo=zone)
                yield local.astimezone(UTC)
    # The clock may also jump into a window or out of it.
    noons = [datetime.combine(date, time(12), tzinfo=zone).astimezone(UTC) for date in dates]
    for low, high in pairwise(noons):
        offset = low.astimezone(zone).utcoffset()
        if offset == high.astimezone(zone).utcoffset():
            continue
        while high - low > timedelta(seconds=1):
            middle = (low + (high - low) / 2).replace(microsecond=0)
            low, high = (middle, high) if middle.astimezone(zone).utcoffset() == offset else (low, middle)
        yield high


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"{part!r} is no weekday; the weekdays are {', '.join(DAYS)}")
        start, count = DAYS.index(first), (DAYS.index(last or first) - DAYS.index(first)) % 7 + 1
        found.update((start + step) % 7 for step in range(count))
    return frozenset(found)


def _minutes(text: str) -> int:
    match = _TIME.fullmatch(text)
    minutes = int(match[1]) * 60 + int(match[2]) if match else 1441
    if minutes > 1440:
        raise ValueError(f"{text!r} is no time of day; write it from 00:00 to 24:00")
    return minutes


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"
