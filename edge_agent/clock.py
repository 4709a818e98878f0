"""The device's time: the system clock, and never earlier than what must have passed.

    synchronised: the system clock, whatever it says          else: the later of the system clock and the floor

The floor is the newest moment that is known to be over: the certificate's beginning, or what was on record while the
clock was synchronised or the floor itself had come to; it goes on with the monotonic clock, and a file remembers it, at
most an hour old. So a board that wakes up in 1970 still knows that last year's manifest has expired. A clock that is
ahead and was never synchronised raises no floor, and does no harm once it is set back.

Where the kernel cannot be asked (ProtectClock= in the unit forbids it), only systemd-timesyncd's word counts, and
without that the careful rule holds.
"""

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

from shared.files import write_durably
from shared.machine import Instant

KEEP_EVERY = 3600.0
"""Seconds between two writes of the file: years of them must not wear a card out."""
LOOK_EVERY = 10.0
"""Seconds between two looks at whether the clock is synchronised."""
TIMESYNCD = Path("/run/systemd/timesync/synchronized")

_STA_UNSYNC = 0x40
_TIME_ERROR = 5
_LATEST = 1 << 40
"""Seconds; what lies beyond is no time."""


class DeviceClock:
    """Tells the device's time; used by the owner thread alone, but for `peek`. `synchronised` looks at the system."""

    def __init__(self, file: Path, since: float, now: Instant, synchronised: Callable[[], bool]) -> None:
        """`since` is a moment (UTC seconds) that is over for certain."""
        self._file, self._synchronised = file, synchronised
        self._floor = max(since, _read(file)), now.mono
        self._keep_at = self._look_at = now.mono
        self._right = False

    @property
    def right(self) -> bool:
        """Whether the system clock was synchronised when it was looked at last."""
        return self._right

    def at(self, now: Instant) -> Instant:
        """`now` as the device should believe it."""
        if self._look_at <= now.mono:
            self._right, self._look_at = self._synchronised(), now.mono + LOOK_EVERY
        if self._right:
            self._floor = now.utc, now.mono
        return self.peek(now)

    def peek(self, now: Instant) -> Instant:
        """The same without a look at the system; any thread may ask."""
        return now if self._right else Instant(now.mono, max(now.utc, self._least(now)))

    def keep(self, now: Instant) -> None:
        """Remember the floor, if the last time was an hour ago; a disk that refuses is asked again in an hour."""
        if now.mono < self._keep_at:
            return
        self._keep_at = now.mono + KEEP_EVERY
        floor = int(self._least(now))
        with contextlib.suppress(OSError):
            write_durably(self._file, f"{floor} {floor}\n".encode())

    def _least(self, now: Instant) -> float:
        utc, mono = self._floor
        return utc + now.mono - mono


def _read(file: Path) -> float:
    """The floor on record; 0 if there is none, or if it is damaged: a digit that flipped could cost years."""
    try:
        first, second = file.read_bytes()[:64].split()
        found = int(first) if first == second and first.isdigit() else 0
    except (OSError, ValueError):
        return 0.0
    return float(found) if found < _LATEST else 0.0


class _Timex(ctypes.Structure):
    """struct timex of <sys/timex.h>, as far as the status, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def synchronised() -> bool:
    """Whether this system's clock is known to be set by time from elsewhere."""
    if TIMESYNCD.exists():
        return True
    found = _Timex()
    state: int = ctypes.CDLL(None).adjtimex(ctypes.byref(found))
    return 0 <= state < _TIME_ERROR and not found.status & _STA_UNSYNC
