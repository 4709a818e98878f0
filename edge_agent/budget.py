"""How much CPU time the trainer has used today, remembered so that no restart and no set clock gives it a second time.

A day goes from midnight to midnight by the wall clock on site, so the two days on which the clocks change have 23 and
25 hours. On record is a little more than was used: a crash may cost some of the day's budget, and never adds to it.
It only counts; whether that is too much is edge_agent.eligibility's to say.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from shared.files import write_durably

BUDGET_FILE = "budget.json"
STEP = 30.0
"""CPU-seconds by which the record is ahead of what was used: one write for each, which a card can bear."""

_SMALL = 1024


@dataclass(frozen=True, slots=True)
class Spending:
    """CPU-seconds used on one day on site."""

    day: date
    seconds: float


def charged(before: Spending, used: float, today: date) -> Spending:
    """`before` and what was `used` since, on `today`.

    Only a later day than the one before starts anew. A clock that is set back takes nothing away, and a midnight that
    comes a second time is no new day. After a clock that was far ahead, the present day has all of it.
    """
    ahead = (before.day - today).days
    if ahead < 0:
        return Spending(today, used)
    return Spending(before.day if ahead == 1 else today, before.seconds + used)


class Budget:
    """The day's account, in a file of the state directory; for one thread. `limit` 0 counts and writes nothing."""

    def __init__(self, state_dir: Path, limit: float) -> None:
        self._file, self._limit = state_dir / BUDGET_FILE, limit
        self._spent: Spending | None = None
        self._recorded: Spending | None = None
        self._total: float | None = None

    def charge(self, total: float | None, today: date) -> float | None:
        """CPU-seconds used on `today`, where the trainers of this process have used `total` so far; None: unknown."""
        if total is None:
            return None
        if self._spent is None:
            self._spent = self._recorded = self._read(today)
        used = 0.0 if self._total is None else max(0.0, total - self._total)
        # A trainer between its end and its burial is missing from the sum, and must not be paid for twice.
        self._total = total if self._total is None else max(total, self._total)
        self._spent = charged(self._spent, used, today)
        record = self._recorded
        if used and (record is None or record.day != self._spent.day or record.seconds < self._spent.seconds):
            self._write(Spending(self._spent.day, self._spent.seconds + STEP))
        return self._spent.seconds

    def close(self) -> None:
        """Put the exact figure on record: this was no crash."""
        if self._spent is not None and self._spent != self._recorded:
            self._write(self._spent)

    def _write(self, record: Spending) -> None:
        if not self._limit:
            return
        # A disk that refuses is asked again with the next seconds; meanwhile this process still knows.
        with contextlib.suppress(OSError):
            write_durably(self._file, json.dumps({"day": f"{record.day}", "seconds": record.seconds}).encode() + b"\n")
            self._recorded = record

    def _read(self, today: date) -> Spending:
        """What is on record; all of today's budget where that cannot be read."""
        try:
            with self._file.open("rb") as file:
                found = json.loads(file.read(_SMALL))
            day, seconds = date.fromisoformat(found["day"]), float(found["seconds"])
            if math.isfinite(seconds) and seconds >= 0:
                return Spending(day, seconds)
        except FileNotFoundError:
            return Spending(today, 0.0)
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pass
        return Spending(today, self._limit)
