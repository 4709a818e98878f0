"""Wakes the agent at the edges of its calendar windows. The only module that imports APScheduler.

It posts `WindowEdge` and decides nothing: whether now is inside a window is edge_agent.calendar's to say, so a wake-up
that comes late, twice or not at all is never wrong, only early or late. The owner answers every WindowEdge with
`plan`. APScheduler follows the wall clock, so a clock that was set leaves its job at the wrong moment: `watch` notices
that and plans again. `plan` and `watch` belong to the owner's thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING

from edge_agent.calendar import Window, next_edge
from shared.machine import Instant

if TYPE_CHECKING:
    from apscheduler.schedulers.background import BackgroundScheduler

JUMP = 2.0
"""Seconds by which the clocks may drift apart between two looks before it counts as a jump; NTP slews far less."""

_JOB = "window-edge"


@dataclass(frozen=True, slots=True)
class WindowEdge:
    """A calendar window has just opened or closed: look at the device, then call `plan`."""


class Schedule:
    """The next edge of `windows` in `zone`, as a posted event."""

    def __init__(self, windows: Sequence[Window], zone: tzinfo, post: Callable[[WindowEdge], None]) -> None:
        self._windows, self._zone, self._post = tuple(windows), zone, post
        self._offset: float | None = None
        self._scheduler = _scheduler() if self._windows else None

    @property
    def planned(self) -> datetime | None:
        """When the next WindowEdge will be posted, in UTC."""
        job = None if self._scheduler is None else self._scheduler.get_job(_JOB)
        when: datetime | None = None if job is None else job.trigger.run_date
        return when

    def start(self, now: Instant) -> None:
        """Begin; without windows no thread is started."""
        self._offset = now.utc - now.mono
        if self._scheduler is not None:
            self._scheduler.start()
            self.plan(now)

    def plan(self, now: Instant) -> None:
        """Replace what was planned by the next edge after `now`."""
        if self._scheduler is None:
            return
        edge = next_edge(self._windows, datetime.fromtimestamp(now.utc, UTC), self._zone)
        if edge is not None:
            self._scheduler.add_job(self._fire, "date", run_date=edge, timezone=UTC, id=_JOB, replace_existing=True)
        elif self._scheduler.get_job(_JOB) is not None:
            self._scheduler.remove_job(_JOB)

    def watch(self, now: Instant) -> bool:
        """Whether the wall clock was set since the last call; if so, the edge is planned anew. Costs a subtraction."""
        offset = now.utc - now.mono
        jumped = self._offset is not None and abs(offset - self._offset) > JUMP
        self._offset = offset
        if jumped:
            self.plan(now)
        return jumped

    def stop(self) -> None:
        """End the thread and wait for it; nothing is posted afterwards."""
        if self._scheduler is not None and self._scheduler.running:
            # Without this, a job that is just running would be looked for in vain and end the thread with a traceback.
            self._scheduler.remove_all_jobs()
            self._scheduler.shutdown(wait=True)

    def _fire(self) -> None:
        self._post(WindowEdge())


def _scheduler() -> "BackgroundScheduler":
    # A device without windows does without the library: 3 MB of resident memory.
    from apscheduler.schedulers.background import BackgroundScheduler

    # The defaults would skip a job that is over a second late, as after suspend.
    defaults = {"misfire_grace_time": None, "coalesce": True, "max_instances": 1}
    return BackgroundScheduler(timezone=UTC, job_defaults=defaults, daemon=True)
